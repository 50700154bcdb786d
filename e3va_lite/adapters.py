"""Adapters (Fig. 4): ``A(x) = x + U(GeLU(D(x)))`` with the projections D and U full or dual low-rank.

New adapters are the identity: the outer factor of U and U's bias are zero. Everything else is random, since if both
factors of a product were zero, neither would ever receive a gradient. So U changes at the first training step and D at
the second. The skip ``+ x`` belongs to the adapter: it makes equation (8) equal to (7) at the start.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InputError

gelu_backward = torch.ops.aten.gelu_backward


class LowRankLinear(nn.Module):
    """Dual low-rank branches (section 3.3): ``y = (s1 t1 + s2 t2) x + b``.

    The sum of two products of rank alpha is one product of rank 2 alpha, ``[s1 s2] [t1; t2]``, and is applied from the
    right: no m x n matrix is formed. Parameters: 2 alpha (m + n) + m.
    """

    def __init__(self, n: int, m: int, rank: int) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.randn(2 * rank, n) * n**-0.5)  # [t1; t2]
        self.s = nn.Parameter(torch.randn(m, 2 * rank) * (2 * rank) ** -0.5)  # [s1 s2], the outer factor
        self.b = nn.Parameter(torch.zeros(m))

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m)"""
        return F.linear(F.linear(x, self.t), self.s, self.b)

    def zero(self) -> None:
        """Make the output zero; the inner factor stays random, so that gradients can still flow."""
        nn.init.zeros_(self.s)


class LowRankAdapter(nn.Module):
    """The E3VA adapter (Fig. 4, right): D and U in dual low-rank branches, middle dimension n/2.

    Args:
        dim: Channels n of the tap.
        rank: alpha of each of the two branches. E3VA 8, E3VA+ 16, E3VA++ 32.
        middle: Middle dimension m; n // 2 if not given.

    Raises:
        InputError: For a rank or middle dimension below 1.
    """

    def __init__(self, dim: int, rank: int = 8, middle: int | None = None) -> None:
        super().__init__()
        middle = dim // 2 if middle is None else middle
        at_least_one(rank=rank, middle=middle)
        self.down = LowRankLinear(dim, middle, rank)
        self.up = LowRankLinear(middle, dim, rank)
        self.up.zero()

    @staticmethod
    def project(x: Tensor, t: Tensor, s: Tensor, b: Tensor, t_up: Tensor) -> Tensor:
        """``z = t_U GeLU(D(x))``, all but U's outer factor, of K adapters at once: (K, T, n) -> (K, T, 2 alpha).

        Args:
            t, s, b, t_up: The parameters ``inner`` of K adapters, stacked.
        """
        return _linear(F.gelu(_linear(_linear(x, t), s, b)), t_up)

    @staticmethod
    def project_again(x: Tensor, grad_z: Tensor, t: Tensor, s: Tensor, b: Tensor, t_up: Tensor) -> tuple[Tensor, ...]:
        """The result z of :meth:`project`, and the gradients of its parameters, given z's (K, T, 2 alpha)."""
        u = _linear(x, t)  # (K, T, 2 alpha)
        h = _linear(u, s, b)  # (K, T, m)
        a = F.gelu(h)
        grad_h = gelu_backward(grad_z @ t_up, h)
        return _linear(a, t_up), (grad_h @ s).mT @ x, grad_h.mT @ u, grad_h.sum(dim=1), grad_z.mT @ a

    @property
    def inner(self) -> tuple[nn.Parameter, ...]:
        """All parameters but ``outer``: D's t, s and b, and U's inner factor."""
        return self.down.t, self.down.s, self.down.b, self.up.t

    @property
    def outer(self) -> tuple[nn.Parameter, nn.Parameter]:
        """U's outer factor (n, 2 alpha) and bias (n,)."""
        return self.up.s, self.up.b

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., n)"""
        return x + self.up(F.gelu(self.down(x)))


class StandardAdapter(nn.Module):
    """The standard adapter (Fig. 4, left; Houlsby et al. 2019): full D and U.

    Args:
        dim: Channels n of the tap.
        middle: Middle dimension m. 64 inside the backbone, 32 on the highway (Table 5).
    """

    def __init__(self, dim: int, middle: int) -> None:
        super().__init__()
        at_least_one(middle=middle)
        self.down = nn.Linear(dim, middle)
        self.up = nn.Linear(middle, dim)
        nn.init.normal_(self.down.weight, std=dim**-0.5)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    @staticmethod
    def project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """``GeLU(D(x))`` of K adapters at once, (K, T, n) -> (K, T, m); arguments as in :class:`LowRankAdapter`."""
        return F.gelu(_linear(x, weight, bias))

    @staticmethod
    def project_again(x: Tensor, grad_z: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        """As :meth:`LowRankAdapter.project_again`."""
        h = _linear(x, weight, bias)
        grad_h = gelu_backward(grad_z, h)
        return F.gelu(h), grad_h.mT @ x, grad_h.sum(dim=1)

    @property
    def inner(self) -> tuple[nn.Parameter, ...]:
        """D's weight and bias."""
        return self.down.weight, self.down.bias

    @property
    def outer(self) -> tuple[nn.Parameter, nn.Parameter]:
        """U's weight (n, m) and bias (n,)."""
        return self.up.weight, self.up.bias

    def change(self, x: Tensor) -> Tensor:
        """The adapter without its skip, for methods that place it elsewhere; (..., n) -> (..., n)."""
        return self.up(F.gelu(self.down(x)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., n)"""
        return x + self.change(x)


class KernelAdapter(nn.Module):
    """A LoRand adapter (Yin et al., CVPR 2023): branches ``P K Q`` with a small kernel K that D and U share.

    Two branches of rank 8 with middle n/2 give the Swin-B count of Table 2 (1.20 M). We found no setting that gives the
    Swin-L count of Table 1 (1.31 M).
    """

    def __init__(self, dim: int, rank: int = 8, branches: int = 2) -> None:
        super().__init__()
        at_least_one(rank=rank, branches=branches)
        middle = dim // 2
        self.kernel = nn.Parameter(torch.randn(branches, rank, rank) * rank**-0.5)
        self.down_in = nn.Parameter(torch.randn(branches, rank, dim) * dim**-0.5)
        self.down_out = nn.Parameter(torch.randn(branches, middle, rank) * (branches * rank) ** -0.5)
        self.down_bias = nn.Parameter(torch.zeros(middle))
        self.up_in = nn.Parameter(torch.randn(branches, rank, middle) * middle**-0.5)
        self.up_out = nn.Parameter(torch.zeros(branches, dim, rank))
        self.up_bias = nn.Parameter(torch.zeros(dim))

    def _project(self, x: Tensor, inner: Tensor, outer: Tensor, bias: Tensor) -> Tensor:
        z = torch.einsum("...n,brn->...br", x, inner)
        z = torch.einsum("...br,bqr->...bq", z, self.kernel)
        return torch.einsum("...bq,bmq->...m", z, outer) + bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., n)"""
        middle = F.gelu(self._project(x, self.down_in, self.down_out, self.down_bias))
        return x + self._project(middle, self.up_in, self.up_out, self.up_bias)


class QVUpdate(nn.Module):
    """LoRA (Hu et al. 2022) on the q and v rows of a fused qkv projection: ``q += B_q A_q x``, ``v += B_v A_v x``."""

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        at_least_one(rank=rank)
        self.a = nn.Parameter(torch.randn(2, rank, dim) * dim**-0.5)
        self.b = nn.Parameter(torch.zeros(2, dim, rank))

    def hook(self, qkv: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """A forward hook for the qkv layer, so that the backbone keeps its state-dict keys."""
        (x,) = inputs
        q, v = (F.linear(F.linear(x, a), b) for a, b in zip(self.a, self.b, strict=True))
        return output + torch.cat([q, torch.zeros_like(q), v], dim=-1)  # (B * windows, tokens, 3 C)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """K linear layers at once: x (K, T, n), weight (K, m, n), bias (K, m) -> (K, T, m)."""
    if bias is None:
        return torch.bmm(x, weight.mT)
    return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


def at_least_one(**sizes: int) -> None:
    """Raise an InputError for the first size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name}={size} leaves the adapter no dimension: choose {name} of 1 or more.")
