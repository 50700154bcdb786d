from . import Wrong

CORRECT = {
    "with loops": {
        "kept": """
def kept(trained):
    names, passed = set(), False
    for i, flag in enumerate(trained):
        if passed and i > 0:  # something below is trained
            names.add(f"a{i}")
        if flag:
            names.add(f"h{i}")
        passed = passed or flag
    return names
""",
        "activation_bytes": """
def activation_bytes(names, widths, batch):
    total = 0
    for name in names:
        kind, i = name[0], int(name[1:])
        if kind == "h" and i == 0:
            continue
        total += batch * widths[i] * 4
    return total
""",
        "step_bytes": """
def step_bytes(total, trained):
    frozen = total - trained
    return {"parameters": (frozen + trained) * 4, "gradients": trained * 4, "optimizer": 2 * trained * 4}
""",
        "ways": """
def all_ways(graph, output, source):
    todo, ways = [(output, [])], []
    while todo:
        node, factors = todo.pop()
        if node == source:
            ways.append(factors)
            continue
        for below, factor in graph[node]:
            todo.append((below, factors + [factor]))
    return ways


def derivative(graph, output, source):
    total = 0
    for way in all_ways(graph, output, source):
        product = 1
        for factor in way:
            product *= factor
        total += product
    return total


def longest(graph, output, source):
    lengths = [sum(f != 1 for f in way) for way in all_ways(graph, output, source)]
    return max(lengths) if lengths else None
""",
        "links_in_stage": """
def links_in_stage(method, depth):
    if method == "full":
        return 11 * depth
    elif method == "lora":
        return 12 * depth
    elif method == "adapter":
        return 17 * depth
    return 5
""",
    },
    "by the lowest trained layer": {
        "kept": """
def kept(trained):
    lowest = list(trained).index(True)
    return {f"h{i}" for i in range(len(trained)) if trained[i]} | {f"a{i}" for i in range(lowest + 1, len(trained))}
""",
        "activation_bytes": """
import numpy as np


def activation_bytes(names, widths, batch):
    number = {"h0": 0} | {f"{k}{i}": w for i, w in enumerate(widths) if i for k in "ah"}
    return int(np.sum([number[n] for n in names])) * batch * 4
""",
        "step_bytes": """
def step_bytes(total, trained):
    numbers = {"parameters": total, "gradients": trained, "optimizer": 2 * trained}
    return {name: 4 * count for name, count in numbers.items()}
""",
        "ways": """
from functools import lru_cache


def derivative(graph, output, source):
    @lru_cache(None)
    def of(node):
        return 1.0 if node == source else float(sum(factor * of(below) for below, factor in graph[node]))

    return of(output)


def longest(graph, output, source):
    @lru_cache(None)
    def of(node):
        if node == source:
            return 0
        found = [of(below) + (0 if factor == 1 else 1) for below, factor in graph[node] if of(below) is not None]
        return max(found) if found else None

    return of(output)
""",
        "links_in_stage": """
SLOPE = {"full": 11, "lora": 12, "adapter": 17, "e3va": 0}
START = {"e3va": 5}


def links_in_stage(method, depth):
    return START.get(method, 0) + SLOPE[method] * depth
""",
    },
    "by simulating the backward pass": {
        "kept": """
def kept(trained):
    names, layers = [], len(trained)
    for i in reversed(range(layers)):
        if trained[i]:
            names.append("h%d" % i)
        if i == 0 or not any(trained[j] for j in range(i)):
            break
        names.append("a%d" % i)
    return names
""",
        "activation_bytes": """
def activation_bytes(names, widths, batch):
    return sum(torch.empty(batch, widths[int(n[1:])]).nbytes for n in set(names) - {"h0"})
""",
        "step_bytes": """
def step_bytes(total, trained):
    weights = torch.empty(trained, requires_grad=True, device="meta")
    return dict(parameters=total * 4, gradients=weights.nbytes, optimizer=weights.nbytes * 2)
""",
        "ways": """
def derivative(graph, output, source):
    # forward accumulation of the gradient, as autograd does it: a node's turn comes when all that use it are done
    gradient = dict.fromkeys(graph, 0)
    gradient[output] = 1
    for node in order(graph, output):
        if node == source:
            continue
        for below, factor in graph[node]:
            gradient[below] += factor * gradient[node]
    return gradient[source]


def longest(graph, output, source):
    length = {output: 0}
    for node in order(graph, output):
        for below, factor in graph[node]:
            length[below] = max(length.get(below, 0), length[node] + int(factor != 1))
    return length.get(source)


def order(graph, output):
    seen, done = set(), []

    def visit(node):
        if node not in seen:
            seen.add(node)
            for below, _ in graph[node]:
                visit(below)
            done.append(node)

    visit(output)
    return done[::-1]
""",
        "links_in_stage": """
PER_BLOCK = {m: measured(m, 1) for m in ("full", "lora", "adapter")}
ALWAYS = measured("e3va", 1)


def links_in_stage(method, depth):
    return ALWAYS if method == "e3va" else PER_BLOCK[method] * depth
""",
    },
    "with matrices": {
        "kept": """
def kept(trained):
    flags = torch.tensor(trained)
    below = flags.cumsum(0) > 0
    inputs = {f"h{i}" for i in flags.nonzero().flatten().tolist()}
    return inputs | {f"a{i + 1}" for i in below[:-1].nonzero().flatten().tolist()}
""",
        "ways": """
import numpy as np


def derivative(graph, output, source):
    # sum of all powers of the matrix of one-step derivatives: (I - J)^-1
    nodes = list(graph)
    jacobian = np.zeros((len(nodes), len(nodes)))
    for node, inputs in graph.items():
        for below, factor in inputs:
            jacobian[nodes.index(node), nodes.index(below)] += factor
    total = np.linalg.inv(np.eye(len(nodes)) - jacobian)
    return total[nodes.index(output), nodes.index(source)]


def longest(graph, output, source):
    best = {output: 0}
    for _ in graph:
        for node, inputs in graph.items():
            for below, factor in inputs:
                if node in best:
                    best[below] = max(best.get(below, -1), best[node] + (factor != 1))
    return best[source] if source in best else None
""",
        "activation_bytes": """
def activation_bytes(names, widths, batch):
    bytes_per_row = 0
    for name in names:
        bytes_per_row += 0 if name == "h0" else 4 * widths[int(name.lstrip("ah"))]
    return bytes_per_row * batch
""",
    },
    "with torch's own answers": {
        "activation_bytes": """
def activation_bytes(names, widths, batch):
    size = torch.tensor([], dtype=torch.float32).element_size()
    return size * batch * sum(widths[int(n[1:])] * (n != "h0") for n in names)
""",
        "ways": """
def derivative(graph, output, source):
    leaf = torch.ones((), dtype=torch.float64, requires_grad=True)

    def value(node):
        if node == source:
            return leaf
        return sum((factor * value(below) for below, factor in graph[node]), start=torch.zeros((), dtype=torch.float64))

    result = value(output)
    return torch.autograd.grad(result, leaf)[0].item() if result.requires_grad else 0


def longest(graph, output, source):
    if output == source:
        return 0
    best = None
    for below, factor in graph[output]:
        rest = longest(graph, below, source)
        if rest is not None:
            rest += factor != 1
            best = rest if best is None or rest > best else best
    return best
""",
        "links_in_stage": """
def links_in_stage(method, depth):
    match method:
        case "e3va":
            return 5
        case "adapter":
            return depth * (11 + 3 + 3)
        case "lora":
            return depth * (11 + 1)
        case "full":
            return depth * 11
""",
    },
}


def kept(inputs: str, bent: str) -> str:
    return f"""
def kept(trained):
    layers = range(len(trained))
    return {{f"h{{i}}" for i in layers if {inputs}}} | {{f"a{{i}}" for i in layers if i > 0 and {bent}}}
"""


def step(parameters: str = "4 * total", gradients: str = "4 * trained", optimizer: str = "8 * trained") -> str:
    return f"""
def step_bytes(total, trained):
    return {{"parameters": {parameters}, "gradients": {gradients}, "optimizer": {optimizer}}}
"""


DERIVATIVE = """
def derivative(graph, output, source):
    if output == source:
        return 1
    return sum(factor * derivative(graph, below, source) for below, factor in graph[output])
"""
LONGEST = """
def longest(graph, output, source):
    if output == source:
        return 0
    paths = [(longest(graph, below, source), factor) for below, factor in graph[output]]
    return max((length + (factor != 1) for length, factor in paths if length is not None), default=None)
"""


def links(full: str = "11 * depth", lora: str = "12 * depth", adapter: str = "17 * depth", e3va: str = "5") -> str:
    return f"""
def links_in_stage(method, depth):
    return {{"full": {full}, "lora": {lora}, "adapter": {adapter}, "e3va": {e3va}}}[method]
"""


IDLE = {
    "kept": "def kept(trained):\n    return set()\n",
    "activation_bytes": "def activation_bytes(names, widths, batch):\n    return 0\n",
    "step_bytes": 'def step_bytes(total, trained):\n    return {"parameters": 0, "gradients": 0, "optimizer": 0}\n',
    "ways": "def derivative(graph, output, source):\n    return 0\n\n\nlongest = derivative\n",
    "links_in_stage": "def links_in_stage(method, depth):\n    return 0\n",
}

WRONG = [
    Wrong(
        "frozen layers keep their input",
        "kept",
        kept("any(trained[: i + 1])", "any(trained[:i])"),
        {"kept_inputs": (2, "only the gradient of a trained weight reads its layer's input")},
    ),
    Wrong(
        "the batch is not kept",
        "kept",
        kept("i > 0 and trained[i]", "any(trained[:i])"),
        {"kept_inputs": (2, "h0 is kept")},
    ),
    Wrong(
        "frozen means free",
        "kept",
        kept("trained[i]", "trained[i - 1]"),
        {"kept_bent": (2, "The gradient passes this GELU on its path")},
    ),
    Wrong(
        "a GELU keeps nothing",
        "kept",
        kept("trained[i]", "False"),
        {"kept_bent": (2, "a GELU reads its own input")},
    ),
    Wrong(
        "gradient runs to the bottom",
        "kept",
        kept("trained[i]", "True"),
        {"kept_bent": (2, "no gradient goes below the lowest trained layer")},
    ),
    Wrong(
        "gradient runs the other way",
        "kept",
        kept("trained[i]", "any(trained[i:])"),
        {"kept_bent": (2, "a1 is not kept: no gradient goes below the lowest trained layer")},
    ),
    Wrong(
        "a GELU keeps its output",
        "kept",
        kept("trained[i] or any(trained[:i])", "False"),
        {"kept_inputs": (2, "is not kept"), "kept_bent": (2, "a GELU reads its own input")},
    ),
    Wrong(
        "numbers for bytes",
        "activation_bytes",
        "def activation_bytes(names, widths, batch):\n"
        "    return sum(batch * widths[int(n[1:])] for n in names if n != 'h0')",
        {"bytes_counted": (2, "a float32 number has 4 bytes")},
    ),
    Wrong(
        "one image for the batch",
        "activation_bytes",
        "def activation_bytes(names, widths, batch):\n"
        "    return sum(4 * widths[int(n[1:])] for n in names if n != 'h0')",
        {"bytes_counted": (2, "the batch is missing")},
    ),
    Wrong(
        "batch counted as an activation",
        "activation_bytes",
        "def activation_bytes(names, widths, batch):\n    return sum(4 * batch * widths[int(n[1:])] for n in names)",
        {"bytes_counted": (2, "the batch itself (h0) is no activation")},
    ),
    Wrong(
        "hard-coded widths",
        "activation_bytes",
        "def activation_bytes(names, widths, batch):\n    return 4 * batch * 512 * len(set(names) - {'h0'})",
        {"bytes_counted": (2, "the ledger says 1600")},
    ),
    Wrong(
        "frozen parameters not counted",
        "step_bytes",
        step(parameters="4 * trained"),
        {"step_parameters": (1, "frozen parameters take memory, too")},
    ),
    Wrong(
        "gradients of frozen parameters",
        "step_bytes",
        step(gradients="4 * total"),
        {"step_gradients": (1, "frozen parameters get no gradient")},
    ),
    Wrong(
        "one moment only",
        "step_bytes",
        step(optimizer="4 * trained"),
        {"step_optimizer": (1, "two numbers per trained parameter")},
    ),
    Wrong(
        "optimiser of everything",
        "step_bytes",
        step(optimizer="8 * total"),
        {"step_optimizer": (1, "keeps nothing for frozen parameters")},
    ),
    Wrong(
        "one way, as printed",
        "ways",
        """
def derivative(graph, output, source):
    # along the way with most factors
    if output == source:
        return 1
    ways = [(longest(graph, below, source), factor, below) for below, factor in graph[output]]
    ways = [(length, factor != 1, factor, below) for length, factor, below in ways if length is not None]
    if not ways:
        return 0
    _, _, factor, below = max(ways, key=lambda way: way[0] + way[1])
    return factor * derivative(graph, below, source)
"""
        + LONGEST,
        {"ways_sum": (3, "the residual path is missing")},
    ),
    Wrong(
        "first input of every node only",
        "ways",
        DERIVATIVE.replace("graph[output])", "graph[output][:1])") + LONGEST,
        {"ways_sum": (3, "every one of them has to be followed")},
    ),
    Wrong(
        "every node visited once",
        "ways",
        """
def derivative(graph, output, source, seen=None):
    seen = set() if seen is None else seen
    if output == source:
        return 1
    total = 0
    for below, factor in graph[output]:
        if (output, below) not in seen:
            seen.add((output, below))
            total += factor * derivative(graph, below, source, seen)
    return total
"""
        + LONGEST,
        {"ways_sum": (3, "the residual path only")},
    ),
    Wrong(
        "inputs as a dict",
        "ways",
        DERIVATIVE.replace("in graph[output]", "in dict(graph[output]).items()") + LONGEST,
        {"ways_sum": (3, "an input that is used twice has two paths")},
    ),
    Wrong(
        "additions counted as links",
        "ways",
        DERIVATIVE + LONGEST.replace("(factor != 1)", "1"),
        {"ways_links": (2, "additions are counted")},
    ),
    Wrong(
        "shortest way",
        "ways",
        DERIVATIVE + LONGEST.replace("max(", "min("),
        {"ways_links": (2, "this is the shortest path")},
    ),
    Wrong(
        "no way has length 0",
        "ways",
        DERIVATIVE + LONGEST.replace("default=None", "default=0").replace("if length is not None", ""),
        {"ways_links": (2, "no path leads there")},
    ),
    Wrong(
        "adapters shorten the way",
        "links_in_stage",
        links(adapter="6 * depth"),
        {"links_backbone": (2, "adapter, 2 blocks: 34 links, not 12")},
    ),
    Wrong(
        "depth does not matter",
        "links_in_stage",
        links("22", "24", "34"),
        {"links_backbone": (2, "its path grows with the depth")},
    ),
    Wrong(
        "hard-coded numbers",
        "links_in_stage",
        links("{2: 22, 6: 66}[depth]", "{2: 24, 6: 72}[depth]", "{2: 34, 6: 102}[depth]", "5").replace(
            'return {"full"', 'return 5 if method == "e3va" else {"full"'
        ),
        {"links_backbone": (2, "right for some depths only: hard-coded?")},
    ),
    Wrong(
        "highway grows",
        "links_in_stage",
        links(e3va="2.5 * depth"),
        {"links_highway": (1, "the path does not grow with the depth")},
    ),
]
