"""Money is exact to the nano-dollar, and an estimate is bounded by everything that bounds an answer."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.catalog import ModelCard, Price
from backends.chat import Usage
from policies.ledger import Amounts
from policies.money import UsdPer1M
from routing.cost import FixedOutputLength, estimate
from tests.calls import make_request

PRICES = st.integers(0, 10**18)
TOKENS = st.integers(0, 10**9)


def price(input_: int = 0, output: int = 0, cached: int | None = None) -> Price:
    return Price(input_nano_usd_per_1m=input_, output_nano_usd_per_1m=output, cached_input_nano_usd_per_1m=cached)


def test_embeddings_reserve_their_prompt_and_nothing_else() -> None:
    card = ModelCard(name="m", price=price(1_000_000, 5_000_000), context_window_tokens=256, task="embeddings")
    request = make_request("embeddings", input=["a", "b"])

    claim = estimate(card, request, tenant_id="t", prompt_tokens=9, lengths=FixedOutputLength())
    assert claim == Amounts(tokens=9, cost_nano_usd=9)


@given(PRICES, PRICES, st.none() | PRICES, TOKENS, TOKENS, TOKENS)
def test_a_cost_is_the_exact_one_rounded_up_to_the_nano_dollar(
    input_: int, output: int, cached_price: int | None, prompt: int, completion: int, cached: int
) -> None:
    usage = Usage(prompt_tokens=prompt, completion_tokens=completion, cached_tokens=cached)
    cheap = min(cached, prompt)

    exact = (
        Fraction(input_, 10**6) * (prompt - cheap)
        + Fraction(input_ if cached_price is None else cached_price, 10**6) * cheap
        + Fraction(output, 10**6) * completion
    )

    assert price(input_, output, cached_price).cost_nano_usd(usage) == math.ceil(exact)


@given(st.decimals("0", "1000", places=4), st.decimals("0", "1000", places=4), TOKENS, TOKENS)
def test_a_price_as_it_is_quoted_gives_the_cost_that_decimals_give(
    input_: Decimal, output: Decimal, prompt: int, completion: int
) -> None:
    card = price(UsdPer1M.parse(f"{input_:f}"), UsdPer1M.parse(f"{output:f}"))
    with localcontext() as context:
        context.prec = 60
        usd = (input_ * prompt + output * completion) / Decimal(10**6)
        nano_usd = math.ceil(usd * 10**9)

    assert card.cost_nano_usd(Usage(prompt_tokens=prompt, completion_tokens=completion)) == nano_usd


def test_what_a_hundred_thousand_tokens_of_a_known_model_cost() -> None:
    mini = price(UsdPer1M.parse("0.15"), UsdPer1M.parse("0.60"), UsdPer1M.parse("0.075"))
    usage = Usage(prompt_tokens=90_000, cached_tokens=40_000, completion_tokens=10_000)

    assert mini.cost_nano_usd(usage) == 16_500_000  # $0.0075 + $0.003 + $0.006
    assert mini.cost_nano_usd(Usage()) == 0
    assert price(1).cost_nano_usd(Usage(prompt_tokens=1)) == 1  # the last fraction rounds up


def card(window: int = 1000, max_output: int | None = None) -> ModelCard:
    return ModelCard(
        name="m",
        price=price(1_000_000, 3_000_000),
        context_window_tokens=window,
        max_output_tokens=max_output,
    )


@pytest.mark.parametrize(
    ("window", "max_output", "max_tokens", "prompt_tokens", "completion"),
    [
        (1000, None, None, 100, 512),  # the usual length
        (1000, None, 50, 100, 50),  # the client's bound
        (1000, 40, 50, 100, 40),  # the model's
        (1000, None, 900, 700, 300),  # what the window leaves
        (1000, None, 900, 1100, 1),  # an estimate of the prompt that is too high leaves at least a token
        (1000, None, 5000, 100, 512),  # a bound above the usual length changes nothing
    ],
)
@pytest.mark.parametrize("n", [1, 3])
def test_an_estimate_is_bounded_by_the_client_the_model_and_the_window_for_every_choice(
    window: int, max_output: int | None, max_tokens: int | None, prompt_tokens: int, completion: int, n: int
) -> None:
    request = make_request(n=n, max_tokens=max_tokens)
    amounts = estimate(
        card(window, max_output),
        request,
        tenant_id="t1",
        prompt_tokens=prompt_tokens,
        lengths=FixedOutputLength(),
    )

    assert amounts == Amounts(tokens=prompt_tokens + n * completion, cost_nano_usd=prompt_tokens + 3 * n * completion)


def test_lengths_are_asked_for_by_tenant_and_model() -> None:
    class Known:
        def p95_tokens(self, tenant_id: str, model: str) -> int:
            return {("t1", "m"): 7}[tenant_id, model]

    assert estimate(card(), make_request(), tenant_id="t1", prompt_tokens=1, lengths=Known()).tokens == 8
