"""The administration face, `/admin/v1/*`: ordinary Litestar routes behind an admin key's role."""
