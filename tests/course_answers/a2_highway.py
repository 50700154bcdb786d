from . import Wrong

CORRECT = {
    "detaching taps": {
        "block_with_highway": """
def block_with_highway(block, l, e, a1, a2):
    l = l.detach()
    f1 = f_p1(block, l).detach()
    f2 = f_p2(block, l + f1).detach()
    return (l + f1 + f2).detach(), e + a1(f1) + a2(f2)
""",
        "highway_maps": """
def highway_maps(swin, adapters, norms, images):
    l = embed(swin, images).detach()
    e, maps = l, []
    for i, stage in enumerate(swin.layers):
        e, l = stage.downsample(e), stage.downsample(l).detach()
        for j, block in enumerate(stage.blocks):
            l, e = given_block(block, l, e, adapters[i][j][0], adapters[i][j][1])
        maps += [norms[i](e).permute(0, 3, 1, 2).contiguous()]
    return maps
""",
        "highway_mode": """
class Highway(nn.Module):
    def __init__(self, swin, adapters, norms):
        super().__init__()
        self.backbone, self.adapters, self.norms = swin, adapters, norms

    def train(self, mode=True):
        model = nn.Module.train(self, mode)
        for module in model.backbone.modules():
            module.training = False
        return model
""",
    },
    "word for word": {
        "block_with_highway": """
def block_with_highway(block, l, e, a1, a2):
    with torch.no_grad():
        new_l = l + f_p1(block, l) + f_p2(block, l + f_p1(block, l))
        taps = f_p1(block, l), f_p2(block, l + f_p1(block, l))
    new_e = e + a1(taps[0]) + a2(taps[1])
    return new_l, new_e
""",
        "highway_maps": """
def highway_maps(swin, adapters, norms, images):
    maps = []
    with torch.no_grad():
        l = embed(swin, images)
    e = l.clone()
    for i in range(4):
        stage = swin.layers[i]
        with torch.no_grad():
            l = stage.downsample(l)
        e = stage.downsample(e)
        for j in range(len(stage.blocks)):
            a1, a2 = adapters[i][j]
            l, e = given_block(stage.blocks[j], l, e, a1, a2)
        maps.append(norms[i](e).movedim(-1, 1))
    return tuple(maps)
""",
        "highway_mode": """
class Highway(nn.Module):
    def __init__(self, swin, adapters, norms):
        super().__init__()
        self.backbone = swin
        self.adapters = adapters
        self.norms = norms

    def train(self, mode=True):
        super().train(mode)
        self.backbone.train(False)
        return self
""",
    },
    "stream and highway in two loops": {
        "block_with_highway": """
@torch.no_grad()
def stream(block, l):
    f1 = f_p1(block, l)
    middle = l + f1
    f2 = f_p2(block, middle)
    return f1, f2, middle + f2


def block_with_highway(block, l, e, a1, a2):
    f1, f2, l = stream(block, l)
    return l, sum([a1(f1), a2(f2)], start=e)
""",
        "highway_maps": """
def highway_maps(swin, adapters, norms, images):
    # the stream first, noting what goes into every block
    with torch.no_grad():
        l = start = embed(swin, images)
        inputs = []
        for stage in swin.layers:
            l = stage.downsample(l)
            inputs.append([])
            for block in stage.blocks:
                inputs[-1].append(l)
                l = plain_block(block, l)
    e, maps = start, []
    for stage, noted, pairs, norm in zip(swin.layers, inputs, adapters, norms):
        e = stage.downsample(e)
        for block, l, pair in zip(stage.blocks, noted, pairs):
            _, e = given_block(block, l, e, *pair)
        maps.append(torch.einsum("bhwc->bchw", norm(e)))
    return maps
""",
        "highway_mode": """
class Highway(nn.Module):
    def __init__(self, swin, adapters, norms):
        super().__init__()
        self.backbone, self.adapters, self.norms = swin, adapters, norms

    def train(self, mode=True):
        self.training = mode
        self.adapters.train(mode)
        self.norms.train(mode)
        self.backbone.eval()
        return self
""",
    },
    "reduction at the end of a stage, for the next one": {
        "block_with_highway": """
def block_with_highway(block, l, e, a1, a2):
    with torch.inference_mode(False), torch.no_grad():
        f1 = f_p1(block, l)
        l = l + f1
        f2 = f_p2(block, l)
        l = l + f2
    e = e + a1(f1)
    e = e + a2(f2)
    return l, e
""",
        "highway_maps": """
def highway_maps(swin, adapters, norms, images):
    layers = list(swin.layers)
    with torch.no_grad():
        l = embed(swin, images)
    e, maps = l, []
    for i, stage in enumerate(layers):
        for block, (a1, a2) in zip(stage.blocks, adapters[i]):
            l, e = given_block(block, l, e, a1, a2)
        maps.append(norms[i](e).permute(0, 3, 1, 2))
        if i + 1 < len(layers):
            with torch.no_grad():
                l = layers[i + 1].downsample(l)
            e = layers[i + 1].downsample(e)
    return maps
""",
        "highway_mode": """
class Highway(nn.Module):
    def __init__(self, swin, adapters, norms):
        super().__init__()
        self.backbone, self.adapters, self.norms = swin, adapters, norms
        swin.eval()
        swin.train = lambda mode=True: swin
""",
    },
    "the deviation d = e - l": {
        "block_with_highway": """
def block_with_highway(block, l, e, a1, a2):
    with torch.no_grad():
        f1 = f_p1(block, l)
        f2 = f_p2(block, l + f1)
        after = l + f1 + f2
    deviation = e - l.detach() + (a1(f1) - f1) + (a2(f2) - f2)
    return after, after + deviation
""",
        "highway_maps": """
def highway_maps(swin, adapters, norms, images):
    @torch.no_grad()
    def without_graph(function, *args):
        return function(*args)

    l = without_graph(embed, swin, images)
    e = l

    def one_stage(stage, pairs, l, e):
        l, e = without_graph(stage.downsample, l), stage.downsample(e)
        for block, pair in zip(stage.blocks, pairs):
            l, e = given_block(block, l, e, *pair)
        return l, e

    maps = []
    for stage, pairs, norm in zip(swin.layers, adapters, norms):
        l, e = one_stage(stage, pairs, l, e)
        maps.append(norm(e).transpose(2, 3).transpose(1, 2))
    return maps
""",
        "highway_mode": """
class Highway(nn.Module):
    def __init__(self, swin, adapters, norms):
        super().__init__()
        self.backbone, self.adapters, self.norms = swin, adapters, norms

    def train(self, mode=True):
        self.training = mode
        for name, child in self.named_children():
            child.train(mode and name != "backbone")
        return self
""",
    },
}


def block(*lines: str) -> str:
    body = "".join(f"    {line}\n" for line in lines)
    return f"def block_with_highway(block, l, e, a1, a2):\n{body}"


TAPS = ("with torch.no_grad():", "    f1 = f_p1(block, l)", "    f2 = f_p2(block, l + f1)")


def maps(boundary: str, start: str = "e = l", after: str = "pass", take: str = "norm(e).permute(0, 3, 1, 2)") -> str:
    """The backbone with other lines where the reductions stand, at the start, behind the blocks, or for a map."""
    return f"""
def highway_maps(swin, adapters, norms, images):
    with torch.no_grad():
        l = embed(swin, images)
    {start}
    maps = []
    for index, (stage, pairs, norm) in enumerate(zip(swin.layers, adapters, norms)):
        {boundary}
        for block, (a1, a2) in zip(stage.blocks, pairs):
            l, e = given_block(block, l, e, a1, a2)
        {after}
        maps.append({take})
    return maps
"""


BOUNDARY = "e, l = stage.downsample(e), stage.downsample(l)"


def mode(*lines: str, init: str = "pass") -> str:
    body = "".join(f"        {line}\n" for line in lines)
    return f"""
class Highway(nn.Module):
    def __init__(self, swin, adapters, norms):
        super().__init__()
        self.backbone, self.adapters, self.norms = swin, adapters, norms
        {init}

    def train(self, mode=True):
{body}"""


IDLE = {
    "block_with_highway": block("return l, e"),
    "highway_maps": "def highway_maps(swin, adapters, norms, images):\n    return []\n",
    "highway_mode": mode("return self"),
}

WRONG = [
    Wrong(
        "adapters inside the backbone",
        "block_with_highway",
        block(
            "with torch.no_grad():",
            "    middle = l + a1(f_p1(block, l))",
            "    after = middle + a2(f_p2(block, middle))",
            *TAPS,
            "return after, e + a1(f1) + a2(f2)",
        ),
        {"block_stream": (1, "equation (6)")},
    ),
    Wrong(
        "second tap from l",
        "block_with_highway",
        block(
            "with torch.no_grad():",
            "    f1, f2 = f_p1(block, l), f_p2(block, l)",
            "    after = l + f1 + f_p2(block, l + f1)",
            "return after, e + a1(f1) + a2(f2)",
        ),
        {"block_highway": (3, "yours is f_P2(l)")},
    ),
    Wrong(
        "first adapter inside the second tap",
        "block_with_highway",
        block(
            *TAPS,
            "    seen = f_p2(block, l + a1(f1))",
            "return (l + f1 + f2).detach(), e + a1(f1) + a2(seen)",
        ),
        {"block_highway": (3, "the first adapter stands inside the second tap")},
    ),
    Wrong(
        "e goes on from l",
        "block_with_highway",
        block(*TAPS, "    after = l + f1 + f2", "return after, l.detach() + a1(f1) + a2(f2)"),
        {"block_highway": (3, "goes on from e, not from l"), "block_learns": (2, "no gradient goes on to the old e")},
    ),
    Wrong(
        "e missing",
        "block_with_highway",
        block(*TAPS, "    after = l + f1 + f2", "return after, a1(f1) + a2(f2)"),
        {"block_highway": (3, "e is missing"), "block_learns": (2, "no gradient goes on to the old e")},
    ),
    Wrong(
        "one adapter at both taps",
        "block_with_highway",
        block(*TAPS, "    after = l + f1 + f2", "return after, e + a1(f1) + a1(f2)"),
        {"block_highway": (3, "a1 stands at both"), "block_learns": (2, "a2 gets no gradient")},
    ),
    Wrong(
        "taps added beside the adapters",
        "block_with_highway",
        block(*TAPS, "    after = l + f1 + f2", "return after, e + f1 + a1(f1) + f2 + a2(f2)"),
        {"block_highway": (3, "the skip is in the adapter already")},
    ),
    Wrong(
        "taps from the highway",
        "block_with_highway",
        block(
            *TAPS,
            "    after = l + f1 + f2",
            "f1 = f_p1(block, e)",
            "f2 = f_p2(block, e + f1)",
            "return after, e + a1(f1) + a2(f2)",
        ),
        {
            "block_highway": (3, "the taps are read from the highway"),
            "block_cut": (2, "the gradient is not cut: it reaches"),
            "block_learns": (2, "the gradient of e is changed on its path"),
        },
    ),
    Wrong(
        "gradient not cut",
        "block_with_highway",
        block("f1 = f_p1(block, l)", "f2 = f_p2(block, l + f1)", "return l + f1 + f2, e + a1(f1) + a2(f2)"),
        {"block_cut": (2, "the gradient is not cut: it reaches")},
    ),
    Wrong(
        "only the taps detached",
        "block_with_highway",
        block(
            "f1 = f_p1(block, l)",
            "f2 = f_p2(block, l + f1)",
            "return l + f1 + f2, e + a1(f1.detach()) + a2(f2.detach())",
        ),
        {"block_cut": (2, "the new l has a graph")},
    ),
    Wrong(
        "detach on the highway",
        "block_with_highway",
        block(*TAPS, "    after = l + f1 + f2", "return after, e.detach() + a1(f1) + a2(f2)"),
        {"block_learns": (2, "detach the taps, not the highway")},
    ),
    Wrong(
        "l changed in place",
        "block_with_highway",
        block(
            "with torch.no_grad():",
            "    f1 = f_p1(block, l)",
            "    l += f1",
            "    f2 = f_p2(block, l)",
            "    l += f2",
            "return l, e + a1(f1) + a2(f2)",
        ),
        {"block_stream": (1, "l was changed in place"), "block_cut": (2, "l was changed in place")},
    ),
    Wrong(
        "e changed in place",
        "block_with_highway",
        block(*TAPS, "    after = l + f1 + f2", "e += a1(f1)", "e += a2(f2)", "return after, e"),
        {"block_stream": (1, "e was changed in place")},
    ),
    Wrong(
        "returned in the wrong order",
        "block_with_highway",
        block(*TAPS, "    after = l + f1 + f2", "return e + a1(f1) + a2(f2), after"),
        {
            "block_stream": (1, "in the wrong order: first the next l"),
            "block_highway": (3, "in the wrong order: first the next l"),
            "block_cut": (2, "in the wrong order: first the next l"),
            "block_learns": (2, "in the wrong order: first the next l"),
        },
    ),
    Wrong(
        "only the highway returned",
        "block_with_highway",
        block(*TAPS, "return e + a1(f1) + a2(f2)"),
        {
            "block_stream": (1, "two tensors have to be returned"),
            "block_highway": (3, "two tensors have to be returned"),
            "block_cut": (2, "two tensors have to be returned"),
            "block_learns": (2, "two tensors have to be returned"),
        },
    ),
    Wrong(
        "adapters under no_grad",
        "block_with_highway",
        block(*TAPS, "    return l + f1 + f2, e + a1(f1) + a2(f2)"),
        {"block_learns": (2, "the adapters ran under no_grad")},
    ),
    Wrong(
        "adapters' results detached",
        "block_with_highway",
        block(*TAPS, "    after = l + f1 + f2", "return after, e + a1(f1).detach() + a2(f2).detach()"),
        {"block_learns": (2, "a1 gets no gradient")},
    ),
    Wrong(
        "wrong stage boundary: map taken behind the reduction",
        "highway_maps",
        maps(
            "pass",
            after="""if index < 3:
            e, l = swin.layers[index + 1].downsample(e), swin.layers[index + 1].downsample(l)""",
            take="[*norms, norms[3]][min(index + 1, 3)](e).permute(0, 3, 1, 2)",
        ),
        {"maps_boundary": (3, "the reduction stands BEFORE the blocks")},
    ),
    Wrong(
        "highway not reduced",
        "highway_maps",
        maps("l = stage.downsample(l)"),
        {
            "maps_boundary": (3, "the parts do not fit"),
            "maps_flow": (2, "the parts do not fit"),
            "maps_cut": (2, "the parts do not fit"),
            "maps_norms": (1, "the parts do not fit"),
            "maps_layout": (1, "the parts do not fit"),
        },
    ),
    Wrong(
        "highway starts anew at every stage",
        "highway_maps",
        maps("l = stage.downsample(l); e = l"),
        {
            "maps_boundary": (3, "the highway starts anew at a boundary"),
            "maps_flow": (2, "no gradient reaches the adapters of stage 1"),
        },
    ),
    Wrong(
        "stream fed from the highway",
        "highway_maps",
        maps("e = stage.downsample(e); l = e"),
        {"maps_boundary": (3, "map 2 is the first wrong one")},
    ),
    Wrong(
        "stream fed from the highway, with its graph",
        "highway_maps",
        maps("e = stage.downsample(e); l = e").replace("given_block(", "leaky_block(")
        + """

def leaky_block(block, l, e, a1, a2):
    f1 = f_p1(block, l)
    f2 = f_p2(block, l + f1)
    return l + f1 + f2, e + a1(f1) + a2(f2)
""",
        {"maps_boundary": (3, "map 2 is the first wrong one"), "maps_cut": (2, "a gradient enters the stream l")},
    ),
    Wrong(
        "reduction of the highway under no_grad",
        "highway_maps",
        maps("""with torch.no_grad():
            e, l = stage.downsample(e), stage.downsample(l)"""),
        {"maps_flow": (2, "it has to pass the inherited reductions")},
    ),
    Wrong(
        "everything under no_grad",
        "highway_maps",
        "@torch.no_grad()" + maps(BOUNDARY),
        {"maps_flow": (2, "no map has a gradient")},
    ),
    Wrong(
        "embedding with a graph",
        "highway_maps",
        maps(BOUNDARY, start="l = embed(swin, images); e = l"),
        {"maps_cut": (2, "a gradient reaches the images")},
    ),
    Wrong(
        "no norms",
        "highway_maps",
        maps(BOUNDARY, take="e.permute(0, 3, 1, 2)"),
        {"maps_norms": (1, "the norms are missing")},
    ),
    Wrong(
        "norms on the highway",
        "highway_maps",
        maps(BOUNDARY, after="e = norm(e)", take="e.permute(0, 3, 1, 2)"),
        {"maps_norms": (1, "the highway itself goes on without it")},
    ),
    Wrong(
        "NHWC",
        "highway_maps",
        maps(BOUNDARY, take="norm(e)"),
        {"maps_layout": (1, "necks want NCHW")},
    ),
    Wrong(
        "NCHW by reshape",
        "highway_maps",
        maps(BOUNDARY, take="norm(e).reshape(len(e), e.shape[3], *e.shape[1:3])"),
        {"maps_layout": (1, "reshape and view leave the numbers in their order")},
    ),
    Wrong(
        "height and width swapped",
        "highway_maps",
        maps(BOUNDARY, take="norm(e).transpose(1, 3)"),
        {"maps_layout": (1, "height and width are swapped")},
    ),
    Wrong(
        "train mode",
        "highway_mode",
        mode("return super().train(mode)", init="swin.eval()"),
        {"mode_frozen": (2, "stochastic depth drops its paths"), "mode_rest": (1, "that is nn.Module's train()")},
    ),
    Wrong(
        "everything stays in eval mode",
        "highway_mode",
        mode("return super().train(False)"),
        {
            "mode_frozen": (2, "train() puts nothing into train mode"),
            "mode_rest": (1, "adapters and norms have to follow train()"),
        },
    ),
    Wrong(
        "train returns nothing",
        "highway_mode",
        mode("super().train(mode)", "self.backbone.eval()"),
        {"mode_rest": (1, "train() has to return the model")},
    ),
]
