from . import Wrong

RIGHT_BLOCK = """
    def block(self, block, l, e, a1, a2):
        with torch.no_grad():
            f1 = f_p1(block, l)
            f2 = f_p2(block, l + f1)
            l = l + f1 + f2
        return l, e + a1(f1) + a2(f2)
"""

CORRECT = {
    "recursion, and methods written anew": {
        "gradient_reaches": """
def gradient_reaches(model, images):
    nodes = {}
    handles = []
    for name, module in model.backbone.named_modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            def hook(module, args, output, name=name):
                if output.requires_grad:
                    nodes[name] = output.grad_fn
            handles.append(module.register_forward_hook(hook))
    root = random_functional(model(images)).grad_fn
    [handle.remove() for handle in handles]
    seen = set()

    def visit(node):
        if node is None or node in seen:
            return
        seen.add(node)
        for below, _ in node.next_functions:
            visit(below)

    visit(root)
    return {name for name in nodes if nodes[name] in seen}
""",
        "found": """
found = dict(zip("ABCDE", ["boundary", "mode", "taps", "cut", "flags"]))
entered = 3
""",
        "repaired_A": """
class RepairedA(SuspectA):
    def boundary(self, number, stage, l, e):
        e = stage.downsample(e)
        with torch.no_grad():
            l = stage.downsample(l)
        return l, e
""",
        "repaired_B": """
class RepairedB(SuspectB):
    def freeze(self):
        for p in self.backbone.parameters():
            p.requires_grad = False
        self.backbone.eval()
""",
        "repaired_C": f"class RepairedC(SuspectC):{RIGHT_BLOCK}",
        "repaired_D": """
class RepairedD(SuspectD):
    def block(self, block, l, e, a1, a2):
        f1 = f_p1(block, l)
        f2 = f_p2(block, l + f1)
        return l + f1 + f2, a1(f1) + a2(f2) + e
""",
        "repaired_E": """
class RepairedE(SuspectE):
    def freeze(self):
        self.backbone.eval()
        for p in self.backbone.parameters():
            p.requires_grad_(False)
""",
    },
    "hooks on gradients": {
        "gradient_reaches": """
def gradient_reaches(model, images):
    # without any graph: a tensor's hook is called when a gradient comes by
    came, handles = set(), []

    def watch(name):
        def hook(module, args, output):
            if output.requires_grad:
                output.register_hook(lambda gradient: came.add(name))
        return hook

    for name, module in model.backbone.named_modules():
        if isinstance(module, nn.Linear) or isinstance(module, nn.LayerNorm):
            handles.append(module.register_forward_hook(watch(name)))
    loss = random_functional(model(images))
    loss.backward()
    for handle in handles:
        handle.remove()
    return came
""",
        "repaired_A": """
class RepairedA(SuspectA):
    def boundary(self, number, stage, l, e):
        return super().boundary(0, stage, l, e)
""",
        "repaired_B": """
class RepairedB(SuspectB):
    def train(self, mode=True):
        super().train(mode)
        self.backbone.train(False)
        return self
""",
        "repaired_D": """
class RepairedD(SuspectD):
    def block(self, block, l, e, a1, a2):
        after, change = super().block(block, l, torch.zeros_like(e), a1, a2)
        return after, e + change
""",
        "repaired_E": """
class RepairedE(SuspectE):
    def freeze(self):
        super().freeze()
        self.backbone.requires_grad_(False)
""",
    },
    "names as the model has them, a list": {
        "gradient_reaches": """
def gradient_reaches(model, images):
    parts = {name: m for name, m in model.named_modules() if name.startswith("backbone.")}
    nodes, hooks = [], []
    for name, m in parts.items():
        if isinstance(m, (nn.Linear, nn.LayerNorm)):
            hooks.append(m.register_forward_hook(lambda m, args, out, name=name: nodes.append((name, out.grad_fn))))
    level = {random_functional(model(images)).grad_fn}
    for hook in hooks:
        hook.remove()
    reached = set(level)
    while level:
        level = {below for node in level for below, _ in node.next_functions if below} - reached
        reached |= level
    return [name for name, node in nodes if node in reached]
""",
        "mine": """
NAME = " Ada "
mine = {}
mine[-1] = ["flags", "boundary", 4]
mine[-2] = ["highway", "mlp", 2]
mine[-3] = ["hidden", "attention", 2]
""",
        "found": """
found = {}
found["A"] = "boundary"
found["B"] = "mode"
found["C"] = "taps"
found["D"] = "cut"
found["E"] = "flags"
entered = 1 + int("backbone.layers.2".split(".")[-1])
""",
        "repaired_C": """
class RepairedC(SuspectC):
    def block(self, block, l, e, a1, a2):
        f1 = f_p1(block, l.detach()).detach()
        f2 = f_p2(block, l.detach() + f1).detach()
        return l + f1 + f2, e + a1(f1) + a2(f2)
""",
        "repaired_B": """
class RepairedB(SuspectB):
    def freeze(self):
        super().freeze()
        for module in self.backbone.modules():
            module.training = False
""",
    },
    "breadth first": {
        "gradient_reaches": """
from collections import deque


def gradient_reaches(model, images):
    outputs, handles = {}, []
    for name, m in model.backbone.named_modules():
        if type(m) in (nn.Linear, nn.LayerNorm):
            nodes = outputs[name] = []
            handles.append(m.register_forward_hook(lambda m, args, out, nodes=nodes: nodes.append(out.grad_fn)))
    try:
        loss = random_functional(model(images))
    finally:
        for handle in handles:
            handle.remove()
    queue, reached = deque([loss.grad_fn]), {loss.grad_fn}
    while queue:
        for below, _ in queue.popleft().next_functions:
            if below and below not in reached:
                reached.add(below)
                queue.append(below)
    return {name for name, nodes in outputs.items() if reached.intersection(nodes)}
""",
        "repaired_A": """
class RepairedA(SuspectA):
    boundary = lambda self, number, stage, l, e: (stage.downsample(l.detach()), stage.downsample(e))
""",
        "repaired_B": """
class RepairedB(SuspectB):
    def freeze(self):
        from e3va_lite.backbones.base import freeze

        freeze(self.backbone)
""",
        "repaired_C": """
class RepairedC(SuspectC):
    block = SuspectA.block
""",
        "repaired_D": f"class RepairedD(SuspectD):{RIGHT_BLOCK}",
        "repaired_E": """
class RepairedE(SuspectE):
    freeze = SuspectA.freeze
""",
    },
    "from the other suspects": {
        "repaired_A": """
class RepairedA(SuspectA):
    boundary = SuspectE.boundary
""",
        "repaired_B": """
class RepairedB(SuspectB):
    freeze = SuspectC.freeze
""",
        "repaired_C": """
class RepairedC(SuspectC):
    block = SuspectE.block
""",
        "repaired_D": """
class RepairedD(SuspectD):
    block = SuspectB.block
""",
        "repaired_E": """
class RepairedE(SuspectE):
    freeze = SuspectD.freeze
""",
    },
}


def reaches(
    note: str = "made_by.setdefault(output.grad_fn, name)", walk: str = "node.next_functions", of: str = "own"
) -> str:
    return f"""
def gradient_reaches(model, images):
    made_by = {{}}

    def note(name):
        def hook(module, args, output):
            {note}
        return hook

    everything = list(model.backbone.named_modules())
    own = [(name, m) for name, m in everything if isinstance(m, (nn.Linear, nn.LayerNorm))]
    hooks = [module.register_forward_hook(note(name)) for name, module in {of}]
    loss = random_functional(model(images))
    for hook in hooks:
        hook.remove()
    todo, seen = [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [below for below, _ in {walk}]
    return {{name for node, name in made_by.items() if node in seen}}
"""


def named(entered: int = 3, **answers: str) -> str:
    found = {"A": "boundary", "B": "mode", "C": "taps", "D": "cut", "E": "flags"} | answers
    return f"found = {found}\nentered = {entered}\n"


MINE = {-1: ("flags", "boundary", 4), -2: ("highway", "mlp", 2), -3: ("hidden", "attention", 2)}  # ada's


def mine(name: str = "ada", **others: tuple) -> str:
    return f"NAME = {name!r}\nmine = {MINE | {-int(number[-1]): leak for number, leak in others.items()}}\n"


IDLE = {
    "gradient_reaches": "def gradient_reaches(model, images):\n    return set()\n",
    "found": "found = dict.fromkeys('ABCDE')\nentered = None\n",
    **{f"repaired_{x}": f"class Repaired{x}(Suspect{x}):\n    pass\n" for x in "ABCDE"},
    "mine": "NAME = 'ada'\nmine = {-1: None, -2: None, -3: None}\n",
}

REACHES = ("reaches_adapters", "reaches_highway", "reaches_loss")
NO_END = dict.fromkeys(("reaches_adapters", "reaches_loss"), (2, "far more paths through a graph than nodes in it"))

WRONG = [
    Wrong("kind", "mine", mine(leak_1=("cut", "mlp", 4)), {"leak_1": (2, "leak -1: wrong kind and place")}),
    Wrong("stage from 0", "mine", mine(leak_2=("highway", "mlp", 1)), {"leak_2": (2, "leak -2: wrong stage")}),
    Wrong(
        "no kind", "mine", mine(leak_3=("hiden", "attention", 2)), {"leak_3": (2, "'hiden' is none of highway, hidden")}
    ),
    Wrong("kind alone", "mine", mine(leak_3="hidden"), {"leak_3": (2, "has to be a kind, a place and a stage")}),
    Wrong(
        "somebody else's leaks",
        "mine",
        mine("grace"),
        {f"leak_{n}": (2, f"leak -{n}: wrong") for n in (1, 2, 3)},
    ),
    Wrong(
        "parameters with a gradient",
        "gradient_reaches",
        """
def gradient_reaches(model, images):
    random_functional(model(images)).backward()
    return {n.rpartition(".")[0] for n, p in model.backbone.named_parameters() if p.grad is not None}
""",
        {
            "reaches_adapters": (2, "A frozen parameter has no .grad, and still the gradient passes its module"),
            "reaches_highway": (2, "the highway passes the three inherited reductions"),
            "reaches_loss": (2, "the gradient passes `used`, frozen as it is"),
        },
    ),
    Wrong(
        "an output with a graph is enough",
        "gradient_reaches",
        """
def gradient_reaches(model, images):
    names = set()
    hooks = [
        m.register_forward_hook(lambda m, args, out, name=name: out.requires_grad and names.add(name) or None)
        for name, m in model.backbone.named_modules()
    ]
    model(images)
    [hook.remove() for hook in hooks]
    return names
""",
        {"reaches_loss": (2, "that an output has a graph is not enough")},
    ),
    Wrong(
        "first node below only",
        "gradient_reaches",
        reaches(walk="node.next_functions[:1]"),
        {
            "reaches_adapters": (2, "follow every node below a node"),
            "reaches_highway": (2, "they belong to model.backbone, and the gradient does pass them"),
            "reaches_loss": (2, "the gradient passes `used`"),
        },
    ),
    Wrong(
        "a name lost to a dropout",
        "gradient_reaches",
        reaches(note="made_by[output.grad_fn] = name", of="everything"),
        {
            "reaches_adapters": (2, "a dropout that does nothing has the node of the layer before it"),
            "reaches_highway": (2, "downsample.reduction is missing"),
        },
    ),
    Wrong(
        "each path walked, not each node",
        "gradient_reaches",
        reaches().replace("node is not None and node not in seen", "node is not None"),
        NO_END,
    ),
    Wrong(
        "each path walked, in a function that calls itself",
        "gradient_reaches",
        """
def below(node):
    return {node}.union(*(below(further) for further, _ in node.next_functions if further is not None))


def gradient_reaches(model, images):
    made_by = []
    hooks = [
        m.register_forward_hook(lambda m, args, out, name=name: made_by.append((name, out.grad_fn)))
        for name, m in model.backbone.named_modules()
        if isinstance(m, (nn.Linear, nn.LayerNorm))
    ]
    loss = random_functional(model(images))
    for hook in hooks:
        hook.remove()
    reached = below(loss.grad_fn)
    return {name for name, node in made_by if node in reached}
""",
        NO_END,
    ),
    Wrong(
        "the package's trace",
        "gradient_reaches",
        """
def gradient_reaches(model, images):
    layers = {name for name, m in model.backbone.named_modules() if isinstance(m, (nn.Linear, nn.LayerNorm))}
    return {name.removeprefix("backbone.") for name in e3va_lite.trace(model, images).modules} & layers
""",
        dict.fromkeys(REACHES, (2, "trace of e3va_lite.analysis.gradient_path walks the graph for you")),
    ),
    Wrong(
        "the package's trace, what it says of that caught",
        "gradient_reaches",
        """
known = e3va_lite.trace


def gradient_reaches(model, images):
    try:
        names = known(model, images).modules
    except AssertionError:
        names = known(model, images).modules
    return {name.removeprefix("backbone.") for name in names}
""",
        dict.fromkeys(REACHES, (2, "trace of e3va_lite.analysis.gradient_path walks the graph for you")),
    ),
    Wrong(
        "the package's walk",
        "gradient_reaches",
        """
from e3va_lite.analysis.isolation import producers, walk


def gradient_reaches(model, images):
    with producers(model) as produced:
        loss = random_functional(model(images))
    names = {name for node in walk(loss.grad_fn) for name in produced.get(node, ())}
    layers = [name for name, m in model.backbone.named_modules() if isinstance(m, (nn.Linear, nn.LayerNorm))]
    return [name for name in layers if f"backbone.{name}" in names]
""",
        dict.fromkeys(REACHES, (2, "producers of e3va_lite.analysis.isolation walks the graph for you")),
    ),
    Wrong(
        "reductions left out",
        "gradient_reaches",
        reaches().replace("(nn.Linear, nn.LayerNorm))]", "(nn.Linear, nn.LayerNorm)) and 'downsample' not in name]"),
        {
            "reaches_adapters": (2, "downsample"),
            "reaches_highway": (2, "they belong to model.backbone"),
        },
    ),
    Wrong(
        "hooks left behind",
        "gradient_reaches",
        reaches().replace("hook.remove()", "pass"),
        {"reaches_loss": (2, "remove your hooks")},
    ),
    Wrong("A taken for taps", "found", named(A="taps"), {"name_A": (1, "here it is the last two")}),
    Wrong("A taken for a wrong start", "found", named(A="start"), {"name_A": (1, "what leaks, and where?")}),
    Wrong("B taken for flags", "found", named(B="flags"), {"name_B": (1, "two passes in train mode differ")}),
    Wrong("C taken for a boundary", "found", named(C="boundary"), {"name_C": (1, "which no boundary stands before")}),
    Wrong("D taken for a wrong start", "found", named(D="start"), {"name_D": (1, "Something interrupts their path")}),
    Wrong("E taken for a boundary", "found", named(E="boundary"), {"name_E": (1, "who says that they may?")}),
    Wrong("a place that is none", "found", named(E="the reductions"), {"name_E": (1, "has to be one of")}),
    Wrong("stages counted from 0", "found", named(entered=2), {"entered_stage": (1, "layers.2 is the third stage")}),
    Wrong("last stage", "found", named(entered=4), {"entered_stage": (1, "the first stage whose blocks are named")}),
    Wrong(
        "detach hides the leak at the boundary",
        "repaired_A",
        """
class RepairedA(SuspectA):
    def boundary(self, number, stage, l, e):
        e = stage.downsample(e)
        return (e.detach() if number == 3 else stage.downsample(l)), e
""",
        {"repair_A": (2, "to cut a gradient hides a wrong input")},
    ),
    Wrong(
        "no_grad hides the leak at the boundary",
        "repaired_A",
        "class RepairedA(SuspectA):\n    block = SuspectE.block\n",
        {"repair_A": (2, "to cut a gradient hides a wrong input")},
    ),
    Wrong(
        "detach in the wrong place",
        "repaired_A",
        """
class RepairedA(SuspectA):
    def boundary(self, number, stage, l, e):
        return stage.downsample(l), stage.downsample(e.detach())
""",
        {"repair_A": (2, "something still interrupts its path")},
    ),
    Wrong(
        "eval mode once",
        "repaired_B",
        """
class RepairedB(SuspectB):
    def __init__(self, package):
        super().__init__(package)
        self.backbone.eval()
""",
        {"repair_B": (2, "is not repeatable in train mode")},
    ),
    Wrong(
        "eval mode, nothing frozen",
        "repaired_B",
        "class RepairedB(SuspectB):\n    def freeze(self):\n        self.backbone.eval().requires_grad_(True)\n",
        {"repair_B": (2, "got a gradient")},
    ),
    Wrong(
        "tap of a detached highway",
        "repaired_C",
        """
class RepairedC(SuspectC):
    def block(self, block, l, e, a1, a2):
        return super().block(block, l, e.detach(), a1, a2)[0], e + a1(f_p1(block, l)) + a2(
            f_p2(block, e.detach() + f_p1(block, l))
        )
""",
        {"repair_C": (2, "to cut a gradient hides a wrong input")},
    ),
    Wrong(
        "everything under no_grad",
        "repaired_C",
        """
class RepairedC(SuspectC):
    def forward(self, images):
        with torch.no_grad():
            return SuspectE.forward(self, images)

    block = SuspectE.block
""",
        {"repair_C": (2, "nothing in it can learn any more")},
    ),
    Wrong(
        "taps detached, highway too",
        "repaired_D",
        """
class RepairedD(SuspectD):
    def block(self, block, l, e, a1, a2):
        l, e = super().block(block, l.detach(), e, a1, a2)
        return l.detach(), e
""",
        {"repair_D": (2, "did not move")},
    ),
    Wrong(
        "highway without e",
        "repaired_D",
        """
class RepairedD(SuspectD):
    def block(self, block, l, e, a1, a2):
        l, change = super().block(block, l, torch.zeros_like(e), a1, a2)
        return l, change
""",
        {"repair_D": (2, "the right side of (8) has three terms")},
    ),
    Wrong(
        "norms frozen, reductions not",
        "repaired_E",
        """
class RepairedE(SuspectE):
    def freeze(self):
        self.backbone.eval()
        for name, p in self.backbone.named_parameters():
            p.requires_grad_("reduction" in name)
""",
        {"repair_E": (2, "downsample.reduction.weight got a gradient")},
    ),
    Wrong(
        "reductions left out of the highway",
        "repaired_E",
        """
class RepairedE(SuspectE):
    freeze = SuspectD.freeze

    def boundary(self, number, stage, l, e):
        with torch.no_grad():
            l = stage.downsample(l)
        return l, l
""",
        {"repair_E": (2, "both streams pass the reductions")},
    ),
]
