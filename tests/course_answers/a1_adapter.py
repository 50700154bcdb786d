from . import Wrong

CORRECT = {
    "with modules": {
        "adapter": """
def adapter(x, down, down_bias, up, up_bias):
    d, u = nn.Linear(down.shape[1], down.shape[0]), nn.Linear(up.shape[1], up.shape[0])
    with torch.no_grad():
        d.weight.copy_(down), d.bias.copy_(down_bias), u.weight.copy_(up), u.bias.copy_(up_bias)
        return nn.Sequential(d, nn.GELU(), u)(x) + x
""",
        "low_rank": """
def low_rank(x, s1, t1, s2, t2, bias):
    return F.linear(F.linear(x, torch.cat([t1, t2])), torch.cat([s1, s2], dim=1), bias)
""",
        "new_adapter": """
def new_adapter(dim, alpha):
    down, up = LowRank(dim, dim // 2, alpha), LowRank(dim // 2, dim, alpha)
    with torch.no_grad():
        up.s1.zero_(), up.s2.zero_(), up.b.zero_()
    return down, up
""",
        "projection_parameters": """
def projection_parameters(n, m, alpha):
    return sum(p.numel() for p in LowRank(n, m, alpha).parameters())
""",
        "e3va_parameters": """
def e3va_parameters(dims, depths, alpha):
    total = 0
    for n, depth in zip(dims, depths):
        for _ in range(depth):
            total += 2 * adapter_parameters(n, alpha)
        total += sum(p.numel() for p in nn.LayerNorm(n).parameters())
    return total
""",
    },
    "with einsum": {
        "adapter": """
def adapter(x, down, down_bias, up, up_bias):
    middle = torch.einsum("...n,mn->...m", x, down) + down_bias
    return x + torch.einsum("...m,nm->...n", F.gelu(middle), up) + up_bias
""",
        "low_rank": """
def low_rank(x, s1, t1, s2, t2, bias):
    y = bias
    for s, t in ((s1, t1), (s2, t2)):
        y = y + torch.einsum("...r,mr->...m", torch.einsum("...n,rn->...r", x, t), s)
    return y
""",
        "new_adapter": """
def new_adapter(dim, alpha):
    down, up = LowRank(dim, dim // 2, alpha), LowRank(dim // 2, dim, alpha)
    up.s1 = nn.Parameter(torch.zeros(dim, alpha))
    up.s2 = nn.Parameter(torch.zeros(dim, alpha))
    up.b = nn.Parameter(torch.zeros(dim))
    return down, up
""",
        "projection_parameters": """
def projection_parameters(n, m, alpha):
    s, t, bias = m * alpha, alpha * n, m
    return 2 * (s + t) + bias
""",
        "e3va_parameters": """
def e3va_parameters(dims, depths, alpha):
    return sum(d * 2 * adapter_parameters(n, alpha) + 2 * n for n, d in zip(dims, depths))
""",
    },
    "written out": {
        "adapter": """
def adapter(x, down, down_bias, up, up_bias):
    a = x @ down.T + down_bias
    h = a * 0.5 * (1 + torch.erf(a / 2**0.5))
    return h @ up.T + up_bias + x
""",
        "low_rank": """
def low_rank(x, s1, t1, s2, t2, bias):
    return x @ t1.T @ s1.T + x @ t2.T @ s2.T + bias
""",
        "new_adapter": """
def new_adapter(dim, alpha):
    # the inner factors this time: their product with the outer ones is zero as well
    down, up = LowRank(dim, dim // 2, alpha), LowRank(dim // 2, dim, alpha)
    for p in (up.t1, up.t2, up.b):
        p.data.zero_()
    return down, up
""",
        "projection_parameters": """
def projection_parameters(n, m, alpha):
    return 2 * alpha * m + 2 * alpha * n + m
""",
        "e3va_parameters": """
def e3va_parameters(dims, depths, alpha):
    adapters = [adapter_parameters(n, alpha) for n in dims]
    blocks = 0
    for one, depth in zip(adapters, depths):
        blocks = blocks + one * depth * 2
    return blocks + 2 * sum(dims)
""",
    },
    "token by token, GELU by its tanh formula": {
        "adapter": """
def adapter(x, down, down_bias, up, up_bias):
    flat, rows = x.reshape(-1, x.shape[-1]), []
    for token in flat:
        middle = F.gelu(torch.mv(down, token) + down_bias, approximate="tanh")
        rows.append(token + torch.mv(up, middle) + up_bias)
    return torch.stack(rows).reshape(x.shape)
""",
        "low_rank": """
def low_rank(x, s1, t1, s2, t2, bias):
    rows = [s1 @ (t1 @ token) + s2 @ (t2 @ token) + bias for token in x.reshape(-1, x.shape[-1])]
    return torch.stack(rows).reshape(*x.shape[:-1], len(bias))
""",
        "new_adapter": """
def new_adapter(dim, alpha):
    parts = LowRank(dim, dim // 2, alpha), LowRank(dim // 2, dim, alpha)
    for name, p in parts[1].named_parameters():
        if name[0] in "sb":
            nn.init.constant_(p, 0.0)
    return parts
""",
    },
    "with classes": {
        "adapter": """
class Adapter(nn.Module):
    def __init__(self, down, down_bias, up, up_bias):
        super().__init__()
        self.weights = down, down_bias, up, up_bias
        self.act = nn.GELU()

    def forward(self, x):
        down, down_bias, up, up_bias = self.weights
        return x.add(torch.matmul(self.act(torch.matmul(x, down.t()) + down_bias), up.t())).add(up_bias)


def adapter(x, *weights):
    return Adapter(*weights)(x)
""",
        "low_rank": """
class Branch:
    def __init__(self, s, t):
        self.s, self.t = s, t

    def __call__(self, x):
        return torch.matmul(torch.matmul(x, self.t.mT), self.s.mT)


low_rank = lambda x, s1, t1, s2, t2, bias: sum([Branch(s1, t1)(x), Branch(s2, t2)(x)]) + bias
""",
        "new_adapter": """
class NewUp(LowRank):
    def __init__(self, n, m, alpha):
        super().__init__(n, m, alpha)
        for p in (self.s1, self.s2, self.b):
            nn.init.zeros_(p)


def new_adapter(dim, alpha):
    return [LowRank(dim, dim // 2, alpha), NewUp(dim // 2, dim, alpha)]
""",
        "projection_parameters": """
def projection_parameters(n, m, alpha):
    with torch.device("meta"):
        return sum(map(torch.numel, LowRank(n, m, alpha).parameters()))
""",
        "e3va_parameters": """
def e3va_parameters(dims, depths, alpha):
    def stage(n, depth):
        return 2 * depth * adapter_parameters(n, alpha) + n + n

    return sum(map(stage, dims, depths))
""",
    },
}


def adapter(body: str) -> str:
    return f"def adapter(x, down, down_bias, up, up_bias):\n    {body}\n"


def low_rank(body: str) -> str:
    return f"def low_rank(x, s1, t1, s2, t2, bias):\n    {body}\n"


def new_adapter(line: str, middle: str = "dim // 2", rank: str = "alpha") -> str:
    parts = f"LowRank(dim, {middle}, {rank}), LowRank({middle}, dim, {rank})"
    return f"def new_adapter(dim, alpha):\n    down, up = {parts}\n    {line}\n    return down, up\n"


def projection(count: str) -> str:
    return f"def projection_parameters(n, m, alpha):\n    return {count}\n"


def e3va(count: str) -> str:
    return f"def e3va_parameters(dims, depths, alpha):\n    return {count}\n"


IDLE = {
    "adapter": adapter("return x"),
    "low_rank": low_rank("return bias.expand(*x.shape[:-1], -1)"),
    "new_adapter": new_adapter("pass"),
    "projection_parameters": projection("0"),
    "e3va_parameters": e3va("0"),
}

ZERO_U = "[nn.init.zeros_(p) for p in (up.s1, up.s2, up.b)]"

WRONG = [
    Wrong(
        "missing skip",
        "adapter",
        adapter("return F.linear(F.gelu(F.linear(x, down, down_bias)), up, up_bias)"),
        {"adapter_skip": (1, "the skip is missing: a new adapter has to return its input, this one returns zeros")},
    ),
    Wrong(
        "skip twice",
        "adapter",
        adapter("return x + (F.linear(F.gelu(F.linear(x, down, down_bias)), up, up_bias) + x)"),
        {"adapter_skip": (1, "the skip adds x itself, and once")},
    ),
    Wrong(
        "x changed in place",
        "adapter",
        adapter("x += F.linear(F.gelu(F.linear(x, down, down_bias)), up, up_bias); return x"),
        {"adapter_skip": (1, "changed in place")},
    ),
    Wrong(
        "no GELU",
        "adapter",
        adapter("return x + F.linear(F.linear(x, down, down_bias), up, up_bias)"),
        {"adapter_change": (2, "the GELU is missing")},
    ),
    Wrong(
        "ReLU",
        "adapter",
        adapter("return x + F.linear(F.relu(F.linear(x, down, down_bias)), up, up_bias)"),
        {"adapter_change": (2, "not a ReLU")},
    ),
    Wrong(
        "GELU behind U",
        "adapter",
        adapter("return x + F.gelu(F.linear(F.linear(x, down, down_bias), up)) + up_bias"),
        {"adapter_change": (2, "not behind U")},
    ),
    Wrong(
        "D without bias",
        "adapter",
        adapter("return x + F.linear(F.gelu(F.linear(x, down)), up, up_bias)"),
        {"adapter_biases": (1, "D's bias is missing")},
    ),
    Wrong(
        "D transposed",
        "adapter",
        adapter("return x + F.linear(F.gelu(x @ down + down_bias), up, up_bias)"),
        {
            "adapter_skip": (1, "is a factor transposed?"),
            "adapter_change": (2, "is a factor transposed?"),
            "adapter_biases": (1, "is a factor transposed?"),
        },
    ),
    Wrong(
        "W formed",
        "low_rank",
        low_rank("return F.linear(x, s1 @ t1 + s2 @ t2, bias)"),
        {"low_rank_cost": (1, "W was formed: multiply from the right")},
    ),
    Wrong(
        "branches mixed",
        "low_rank",
        low_rank("return F.linear(F.linear(x, t1 + t2), s1 + s2, bias)"),
        {"low_rank_value": (2, "the branches are mixed")},
    ),
    Wrong(
        "one branch only",
        "low_rank",
        low_rank("return F.linear(F.linear(x, t1), s1, bias)"),
        {"low_rank_value": (2, "the second branch is missing")},
    ),
    Wrong(
        "factors crossed",
        "low_rank",
        low_rank("return F.linear(F.linear(x, t1), s2) + F.linear(F.linear(x, t2), s1) + bias"),
        {"low_rank_value": (2, "the factors are crossed")},
    ),
    Wrong(
        "shared bias added per branch",
        "low_rank",
        low_rank("return F.linear(F.linear(x, t1), s1, bias) + F.linear(F.linear(x, t2), s2, bias)"),
        {"low_rank_bias": (1, "the two branches share one bias")},
    ),
    Wrong(
        "transposed factor",
        "low_rank",
        low_rank("return x @ t1.T @ s1 + x @ t2.T @ s2 + bias"),
        {
            "low_rank_value": (2, "is a factor transposed?"),
            "low_rank_bias": (1, "is a factor transposed?"),
            "low_rank_cost": (1, "is a factor transposed?"),
        },
    ),
    Wrong(
        "U not zero",
        "new_adapter",
        new_adapter("nn.init.zeros_(up.b)"),
        {"new_identity": (1, "U is not zero"), "new_moves": (2, "U is not zero at the start")},
    ),
    Wrong(
        "U's bias not zero",
        "new_adapter",
        new_adapter("[nn.init.zeros_(p) for p in (up.s1, up.s2)]"),
        {"new_identity": (1, "U's bias is not zero")},
    ),
    Wrong(
        "both factors zero",
        "new_adapter",
        new_adapter("[nn.init.zeros_(p) for p in up.parameters()]"),
        {"new_moves": (2, "where both factors of a product are zero neither ever gets a gradient")},
    ),
    Wrong(
        "D zero as well",
        "new_adapter",
        new_adapter("[nn.init.zeros_(p) for p in (*up.parameters(), *down.parameters())]"),
        {"new_moves": (2, "D.s1, D.s2, D.t1, D.t2")},
    ),
    Wrong(
        "zero and frozen",
        "new_adapter",
        new_adapter("[p.requires_grad_(False).zero_() for p in (up.s1, up.s2, up.b)]"),
        {"new_moves": (2, "zero at the start does not mean frozen")},
    ),
    Wrong(
        "middle dimension 64",
        "new_adapter",
        new_adapter(ZERO_U, middle="64"),
        {"new_dims": (1, "the middle dimension is dim // 2 = 8, not 64")},
    ),
    Wrong(
        "alpha shared out over the branches",
        "new_adapter",
        new_adapter(ZERO_U, rank="alpha // 2"),
        {"new_dims": (1, "each branch has rank alpha")},
    ),
    Wrong(
        "bias not counted",
        "projection_parameters",
        projection("2 * alpha * (m + n)"),
        {"count_projection": (2, "the bias is missing")},
    ),
    Wrong(
        "a bias per branch",
        "projection_parameters",
        projection("2 * (alpha * (m + n) + m)"),
        {"count_projection": (2, "the branches share one bias")},
    ),
    Wrong(
        "examples by heart",
        "projection_parameters",
        projection("{192: 4704, 20: 430}[n]"),
        {"count_projection": (2, "384")},
    ),
    Wrong(
        "one adapter per block",
        "e3va_parameters",
        e3va("sum(d * adapter_parameters(n, alpha) + 2 * n for n, d in zip(dims, depths))"),
        {"count_blocks": (1, "a block has two adapters")},
    ),
    Wrong(
        "norms not counted",
        "e3va_parameters",
        e3va("sum(2 * d * adapter_parameters(n, alpha) for n, d in zip(dims, depths))"),
        {"count_norms": (1, "the norms are missing")},
    ),
    Wrong(
        "norms without bias",
        "e3va_parameters",
        e3va("sum(2 * d * adapter_parameters(n, alpha) + n for n, d in zip(dims, depths))"),
        {"count_norms": (1, "a LayerNorm has a weight and a bias")},
    ),
    Wrong(
        "hard-coded numbers",
        "e3va_parameters",
        e3va("1_792_512"),
        {"count_blocks": (1, "counted, not known by heart"), "count_norms": (1, "not 1792512")},
    ),
]
