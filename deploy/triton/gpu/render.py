#!/usr/bin/env python3
"""Render a variant: a Triton model repository, the commands that build and start it, its card, its part of a policy.

    render.py --list
    render.py llama-3.1-8b-fp8 --out /serve --templates /app/all_models

Needs Python 3.10 or newer and PyYAML: NVIDIA's container has both, and so has Forebay's environment.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import documents
import memory
import repository
import variant as variants

HERE = Path(__file__).parent / "variants"


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    if options.list:
        for path in sorted(HERE.glob("*.yaml"), key=lambda path: path.stem):
            print(f"{path.stem:<36} {variants.read(path).card.summary}")  # noqa: T201
        return 0
    try:
        notes = render(options)
    except (variants.BadVariant, repository.BadTemplates) as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    for note in notes:
        print(note)  # noqa: T201
    return 0


def render(options: argparse.Namespace) -> list[str]:
    """Write everything below `options.out`. Returns what the operator should know."""
    variant = variants.read(_variant_path(options.variant))
    model = options.model_dir or f"/models/{variant.name}"
    paths = repository.Paths(model=model, engine=options.engine_dir or f"/engines/{variant.name}")
    if memory.estimate(variant).full_sequences < 1:
        raise variants.BadVariant(
            f"{options.variant}: limits.sequence_tokens: not one request of this length fits the GPUs"
        )
    out: Path = options.out
    notes = repository.write(variant, paths, out / "model_repository", options.templates)
    for name, text in {
        "build.sh": documents.build_sh(variant, paths),
        "start.sh": documents.start_sh(variant),
        "MODEL_CARD.md": documents.model_card(variant, paths),
        "forebay.yaml": documents.forebay_yaml(variant, options.model_folder or model, options.host),
    }.items():
        (out / name).write_text(text)
        (out / name).chmod(0o755 if name.endswith(".sh") else 0o644)
    if not options.templates:
        notes.append("Without --templates there is no model.py: render again in the container before you start Triton.")
    return notes


def _variant_path(given: str) -> Path:
    path = HERE / f"{given}.yaml"
    if path.is_file():
        return path
    if Path(given).is_file():
        return Path(given)
    known = ", ".join(sorted(each.stem for each in HERE.glob("*.yaml")))
    raise variants.BadVariant(f"{given}: no such variant, and no such file (known: {known})")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("variant", nargs="?", help="a name from --list, or the path of a variant file of your own")
    parser.add_argument("--out", type=Path, help="the folder to write")
    parser.add_argument("--templates", type=Path, help="all_models of a TensorRT-LLM release: /app/all_models")
    parser.add_argument("--model-dir", help="weights and tokenizer, in the container (default: /models/VARIANT)")
    parser.add_argument("--engine-dir", help="engines, in the container (default: /engines/VARIANT)")
    parser.add_argument("--model-folder", help="tokenizer, on the gateway's machine (default: as --model-dir)")
    parser.add_argument("--host", default="127.0.0.1", help="where the gateway finds Triton (default: 127.0.0.1)")
    parser.add_argument("--list", action="store_true", help="list the variants and end")
    options = parser.parse_args(arguments)
    if not options.list and not (options.variant and options.out):
        parser.error("name a variant and --out, or ask for --list")
    return options


if __name__ == "__main__":
    sys.exit(main())
