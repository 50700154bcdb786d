import itertools

import pytest
import torch

from e3va_lite import build_backbone
from e3va_lite.gradients import random_functional
from e3va_lite.memory import LiveBytes, interleaved_seconds, peak_bytes

MIB = 2**20


def mib(count: int) -> torch.Tensor:
    return torch.empty(count * MIB, dtype=torch.uint8)


def test_live_bytes_follow_birth_and_death():
    known = mib(2)
    with LiveBytes([known, known.view(2, -1)]) as live:
        assert live.now == 2 * MIB  # a view is no new memory
        a = mib(3)
        b = a[: MIB // 2]
        assert live.now == 5 * MIB
        del a
        assert live.now == 5 * MIB  # b keeps all of it alive
        del b
        assert live.now == 2 * MIB
        c = torch.empty_like(known)
        assert live.now == 4 * MIB
    assert live.peak == 5 * MIB
    del c


def test_what_autograd_saves_counts_until_backward_frees_it():
    x = torch.randn(MIB // 4, requires_grad=True)  # 1 MiB
    with LiveBytes([x]) as live:
        y = x.exp()  # saves its own output
        z = y.sin()  # saves y
        del y
        assert live.now == pytest.approx(3 * MIB, rel=1e-3)  # y lives on in the graph
        z.sum().backward()
        del z
        assert live.now == pytest.approx(2 * MIB, rel=1e-3)  # x and its gradient


def test_the_counted_peak_is_what_the_hand_computes():
    """A linear layer n -> n under SGD: parameter, gradient, input, output and what backward needs at once."""
    n = 512
    layer, x = torch.nn.Linear(n, n, bias=False), torch.randn(n, n)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)

    def step():
        optimizer.zero_grad()
        layer(x).sum().backward()
        optimizer.step()

    got = peak_bytes(step, lambda: [layer.weight, layer.weight.grad, x], torch.device("cpu"))
    one = 4 * n * n
    # weight + x, then at worst the gradient of the output laid out in full and the weight's gradient beside it
    assert 3 * one <= got <= 5 * one


@pytest.mark.parametrize("size", [112])
def test_the_highway_needs_less_than_adapters_inside_the_backbone(size, device):
    peaks = {}
    for method in ("fixed", "e3va", "adapter", "full"):
        backbone = build_backbone(method, "swin_nano", fpn_norm="trainable").to(device).train()
        images = torch.randn(4, 3, size, size, device=device)
        optimizer = torch.optim.AdamW([p for p in backbone.parameters() if p.requires_grad])

        def step(backbone=backbone, optimizer=optimizer, images=images):
            optimizer.zero_grad()
            random_functional(backbone(images)).backward()
            optimizer.step()

        def known(backbone=backbone, optimizer=optimizer, images=images):
            state = itertools.chain(*(values.values() for values in optimizer.state.values()))
            grads = [p.grad for p in backbone.parameters() if p.grad is not None]
            return [images, *backbone.parameters(), *grads, *state]

        peaks[method] = peak_bytes(step, known, device)
    assert peaks["fixed"] < peaks["e3va"] < 0.75 * peaks["adapter"] < 0.75 * peaks["full"]


def test_seconds_are_taken_in_turn():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = interleaved_seconds(steps, rounds=3, device=torch.device("cpu"))
    assert order == ["a", "b"] * 4
    assert all(values.shape == (3,) and (values >= 0).all() for values in seconds.values())
