import pytest
import torch

from e3va_lite import InputError
from e3va_lite.adapters import KernelAdapter, LowRankAdapter, LowRankLinear, QVUpdate, StandardAdapter
from e3va_lite.methods.inside import ScaledAdapter

NEW = [
    lambda: LowRankAdapter(48, rank=4),
    lambda: StandardAdapter(48, middle=16),
    lambda: KernelAdapter(48, rank=4),
]


def test_low_rank_linear_is_the_sum_of_two_products():
    linear = LowRankLinear(n=10, m=6, rank=2)
    torch.nn.init.normal_(linear.b)
    t1, t2 = linear.t.chunk(2, dim=0)  # alpha x n each
    s1, s2 = linear.s.chunk(2, dim=1)  # m x alpha each
    x = torch.randn(3, 5, 10)
    torch.testing.assert_close(linear(x), x @ (s1 @ t1 + s2 @ t2).T + linear.b)
    assert sum(p.numel() for p in linear.parameters()) == 2 * 2 * (6 + 10) + 6


def test_two_branches_learn_as_one_of_twice_the_rank():
    """Which of the two a paper means can be seen in no number: outputs and AdamW's updates are the same."""
    one = LowRankLinear(n=10, m=6, rank=2)
    branches = [torch.nn.Parameter(p.detach().clone()) for p in (*one.t.chunk(2, dim=0), *one.s.chunk(2, dim=1))]
    t1, t2, s1, s2 = branches
    optimizers = [torch.optim.AdamW(params, lr=0.05, weight_decay=0.1) for params in ([one.t, one.s], branches)]
    for _ in range(5):
        x = torch.randn(8, 10)
        outputs = one(x) - one.b, x @ t1.T @ s1.T + x @ t2.T @ s2.T
        torch.testing.assert_close(*outputs)
        for output, optimizer in zip(outputs, optimizers, strict=True):
            output.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(one.s, torch.cat([s1, s2], dim=1))


def test_low_rank_adapter_never_forms_the_whole_matrix():
    """No tensor of m x n or more elements appears, forward or backward, when the batch is one token."""
    n, rank = 256, 2
    adapter = LowRankAdapter(n, rank)
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with Sizes():
        adapter(torch.randn(1, n)).sum().backward()
    assert max(sizes) == 2 * rank * n  # the larger factor itself


@pytest.mark.parametrize("make", NEW)
def test_a_new_adapter_is_the_identity(make):
    x = torch.randn(2, 7, 48)
    assert torch.equal(make()(x), x)


def test_parallel_and_lora_parts_start_at_zero():
    x = torch.randn(2, 7, 48)
    assert not ScaledAdapter(48, 16)(x).any()
    qkv = torch.nn.Linear(48, 144)
    assert torch.equal(QVUpdate(48, 4).hook(qkv, (x,), qkv(x)), qkv(x))


def test_lora_changes_q_and_v_only():
    update, qkv = QVUpdate(48, 4), torch.nn.Linear(48, 144)
    torch.nn.init.normal_(update.b)
    x = torch.randn(2, 7, 48)
    q, k, v = (update.hook(qkv, (x,), qkv(x)) - qkv(x)).chunk(3, dim=-1)
    assert q.abs().min() > 0 and v.abs().min() > 0 and not k.any() and not torch.equal(q, v)


@pytest.mark.parametrize("make", NEW)
def test_up_moves_at_the_first_step_and_down_at_the_second(make):
    adapter = make()
    x, target = torch.randn(64, 48), torch.randn(64, 48)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    start = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    outer = {"up.s", "up.b", "up.weight", "up.bias", "up_out", "up_bias"}
    for step in (1, 2):
        optimizer.zero_grad()
        (adapter(x) - target).square().mean().backward()
        optimizer.step()
        moved = {name for name, p in adapter.named_parameters() if not torch.equal(p, start[name])}
        assert moved == (outer & set(start) if step == 1 else set(start))


@pytest.mark.parametrize("rank", [0, -1])
def test_no_rank_is_refused(rank):
    with pytest.raises(InputError, match=f"rank={rank}"):
        LowRankAdapter(48, rank)
