import logging
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from deployments.world_model.attention import attention, attention_backend, choose_backend

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def softmax_attention(q_BQHD: Tensor, k_BKHD: Tensor, v_BKHD: Tensor) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q_BQHD, k_BKHD) / q_BQHD.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v_BKHD)


def inputs(queries: int = 5, keys: int = 7, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, queries, 3, 16), (2, keys, 3, 16), (2, keys, 3, 16))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


@pytest.fixture(autouse=True)
def undecided() -> Iterator[None]:
    """Each test finds out anew which kernel works, and leaves no finding behind."""
    choose_backend.cache_clear()
    yield
    choose_backend.cache_clear()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Kernel | None], None]:
    """Put an xformers in place that has this kernel; None for an xformers that is not installed."""

    def put(kernel: Kernel | None) -> None:
        if kernel is None:
            monkeypatch.setitem(sys.modules, "xformers", None)  # importing it raises ImportError
            monkeypatch.delitem(sys.modules, "xformers.ops", raising=False)
            return
        package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
        vars(ops)["memory_efficient_attention"] = kernel
        monkeypatch.setitem(sys.modules, "xformers", package)
        monkeypatch.setitem(sys.modules, "xformers.ops", ops)

    return put


@pytest.mark.parametrize(("queries", "keys"), [(5, 7), (1, 1), (8, 1)])
def test_pytorchs_kernel_is_softmax_attention(
    install: Callable[[Kernel | None], None], queries: int, keys: int
) -> None:
    install(None)
    q, k, v = inputs(queries, keys)
    torch.testing.assert_close(attention(q, k, v), softmax_attention(q, k, v), atol=1e-5, rtol=0)


def test_the_result_has_the_dtype_of_the_values() -> None:
    assert attention(*inputs(dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_an_xformers_that_works_is_used(install: Callable[[Kernel | None], None]) -> None:
    shapes = []

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shapes.append(tuple(q.shape))
        return softmax_attention(q, k, v)

    install(kernel)
    q, k, v = inputs()
    torch.testing.assert_close(attention(q, k, v), softmax_attention(q, k, v))
    assert attention_backend("cpu", torch.float32, 16) == "xformers"
    assert shapes[-1] == (2, 5, 3, 16)


def test_without_xformers_attention_is_pytorchs(install: Callable[[Kernel | None], None]) -> None:
    install(None)
    assert attention_backend() == "sdpa"


@pytest.mark.parametrize("error", [NotImplementedError, RuntimeError, ValueError])
def test_an_xformers_without_a_kernel_for_this_device_is_not_used(
    install: Callable[[Kernel | None], None], error: type[Exception]
) -> None:
    calls = []

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(q)
        raise error("No operator found for `memory_efficient_attention_forward`")

    install(kernel)
    q, k, v = inputs()
    for _ in range(3):
        torch.testing.assert_close(attention(q, k, v), softmax_attention(q, k, v), atol=1e-5, rtol=0)
    assert attention_backend("cpu", torch.float32, 16) == "sdpa"
    assert len(calls) == 1, "it is tried once"


@pytest.mark.parametrize("wrong", [torch.zeros_like, lambda q: q * float("nan")], ids=["zeros", "nan"])
def test_an_xformers_that_gives_wrong_numbers_is_not_used(
    install: Callable[[Kernel | None], None], wrong: Callable[[Tensor], Tensor]
) -> None:
    install(lambda q, k, v: wrong(q))
    assert attention_backend() == "sdpa"


def test_training_does_not_use_xformers(install: Callable[[Kernel | None], None]) -> None:
    install(lambda q, k, v: softmax_attention(q, k, v).detach())  # has no backward pass
    q, k, v = inputs()
    attention(q.requires_grad_(), k, v).sum().backward()
    assert q.grad is not None


def test_the_choice_is_logged_once_with_its_reason(
    install: Callable[[Kernel | None], None], caplog: pytest.LogCaptureFixture
) -> None:
    install(None)
    with caplog.at_level(logging.INFO, logger="deployments.world_model.attention"):
        for _ in range(3):
            attention(*inputs())
    assert [record.message for record in caplog.records] == [
        "attention on cpu in torch.float32 with heads of 16 uses sdpa: xformers is not installed"
    ]


def test_a_compiled_graph_holds_the_choice(install: Callable[[Kernel | None], None]) -> None:
    install(None)
    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    q, k, v = inputs()
    torch.testing.assert_close(compiled(q, k, v), softmax_attention(q, k, v), atol=1e-5, rtol=0)
