"""Where a model is cut: the modules that are measured, recomputed, sharded and placed as one piece."""

from collections.abc import Collection, Iterator

from torch import nn
from torch.nn.utils import parametrize

from sheaf.graph.facts import GLUE, within

MOST = 0.5  # of the model's parameters
_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)  # torch's own that call what they are made of


def cut(model: nn.Module, begins: Collection[str] = ()) -> dict[str, nn.Module]:
    """The model's blocks by module name, in the order in which the model defines them.

    Lists, dicts and chains of modules are opened. One of several modules of a class in such a container is a block
    (a transformer's layer, a residual block), unless it is a stage of such modules itself; so is a module without
    children. Any other module is opened when such repetition is inside it, or when it holds most of the model.
    Blocks never overlap, and a module that is used under two names is in one block. What an opened module holds
    directly belongs to no block: see ``owners``.

    A block inside of which one of ``begins`` is gives way to the modules that it is made of, as far down as that
    module; ``opened`` names such blocks.

    >>> from torch import nn
    >>> list(cut(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))))
    ['0', '1', '2']
    >>> layer = lambda: nn.TransformerEncoderLayer(4, 2, 8)
    >>> model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "layers": nn.ModuleList([layer(), layer()])})
    >>> list(cut(model))
    ['embed', 'layers.0', 'layers.1']
    >>> [name for name in cut(model, ["layers.1.norm1"]) if "norm" in name]
    ['layers.1.norm1', 'layers.1.norm2']
    """
    return _refined(model, begins)[0]


def opened(model: nn.Module, begins: Collection[str]) -> dict[str, nn.Module]:
    """The modules that gave way to what they are made of, by name, the blocks first.

    >>> list(opened(nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2))), ["1.1"]))
    ['1']
    """
    return _refined(model, begins)[1]


def finer(model: nn.Module) -> tuple[str, ...]:
    """One module inside of each block that calls what it is made of, and inside of each chain or large module of it:
    ``begins`` for the finest cut that is looked at.
    """
    found: list[str] = []
    for name, block in _blocks(model).items():
        if is_openable(block):
            inside = _opened({name: block}, name)
            found += list(inside)[:1]
            for path, piece in inside.items():
                large = _num_elements(piece) > MOST * _num_elements(block)
                if is_openable(piece) and (isinstance(piece, nn.Sequential) or large):
                    found += list(_opened({path: piece}, path))[:1]
    return tuple(found)


def is_openable(block: nn.Module) -> bool:
    """Whether a block may give way to the modules it is made of: its forward is Python that calls them."""
    if not is_composite(block) or parametrize.is_parametrized(block):
        return False
    own = type(block).__module__.startswith("torch.")
    return not own or isinstance(block, (nn.Sequential, *_LAYERS))


def _refined(model: nn.Module, begins: Collection[str]) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The blocks, and the modules that gave way to theirs."""
    blocks, gone = _blocks(model), dict[str, nn.Module]()
    for name in begins:
        while (around := _around(name, blocks)) is not None and is_openable(blocks[around]):
            gone[around] = blocks[around]
            blocks = _opened(blocks, around)
    return blocks, gone


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    if _is_whole(model) and not _repeats(model):
        return {"": model}
    finder = _Finder(model)
    finder.open("", model)
    return finder.blocks


def _around(name: str, blocks: Collection[str]) -> str | None:
    """The block that a module of that name is inside of, if any."""
    return next((block for block in blocks if within(name, block)), None)


def _opened(blocks: dict[str, nn.Module], name: str) -> dict[str, nn.Module]:
    """The blocks with one of them replaced by the modules it is made of."""
    seen = {id(inner) for other, block in blocks.items() if other != name for inner in block.modules()}
    made: dict[str, nn.Module] = {}
    for other, block in blocks.items():
        if other != name:
            made[other] = block
            continue
        for path, piece in _pieces(block, name):
            if id(piece) not in seen:
                made[path] = piece
                seen.update(id(inner) for inner in piece.modules())
    return made


def _pieces(block: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules that a block is made of; those in lists and dicts, which do nothing themselves, one by one."""
    for child_name, child in block.named_children():
        path = f"{name}.{child_name}" if name else child_name
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _pieces(child, path)
        else:
            yield path, child


def is_composite(block: nn.Module) -> bool:
    """Whether a block is made of other modules: only such a one keeps more than its input for backward."""
    return any(True for _ in block.children())


def owners(model: nn.Module, begins: Collection[str] = ()) -> dict[str, tuple[str, ...]]:
    """Which parameters each block owns, by canonical name; GLUE owns what is in no block.

    Every parameter is owned once: a shared one by the first block, in the model's order, that holds it.

    >>> tied = nn.ModuleDict({"first": nn.Linear(2, 2, bias=False), "last": nn.Linear(2, 2)})
    >>> tied["last"].weight = tied["first"].weight
    >>> owners(tied)
    {'first': ('first.weight',), 'last': ('last.bias',), '<glue>': ()}
    """
    canonical = {id(parameter): name for name, parameter in model.named_parameters()}
    owned: dict[str, tuple[str, ...]] = {}
    for name, module in cut(model, begins).items():
        held = [id(parameter) for parameter in module.parameters()]
        owned[name] = tuple(canonical.pop(key) for key in held if key in canonical)
    owned[GLUE] = tuple(canonical.values())
    return owned


class _Finder:
    """Walks a model once and collects its blocks."""

    def __init__(self, model: nn.Module) -> None:
        self.blocks: dict[str, nn.Module] = {}
        self._seen: set[int] = set()
        self._total = _num_elements(model)

    def open(self, name: str, module: nn.Module) -> None:
        """Cut what is inside a module."""
        self._seen.add(id(module))
        sizes = [(type(other), _num_elements(other)) for other in module.children()]
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}" if name else child_name
            if id(child) in self._seen:
                continue
            alike = [size for kind, size in sizes if kind is type(child)]
            if self._opens(child, alike, in_list=_is_container(module)):
                self.open(path, child)
            else:
                self.blocks[path] = child
                self._seen.update(id(inner) for inner in child.modules())

    def _opens(self, module: nn.Module, alike: list[int], *, in_list: bool) -> bool:
        if next(module.children(), None) is None:
            # an empty list or dict does no work and holds nothing
            return isinstance(module, nn.ModuleList | nn.ModuleDict)
        if parametrize.is_parametrized(module):
            return False
        repeated = len(alike) > 1
        large = _num_elements(module) > MOST * self._total
        if _is_container(module):
            small_chain = isinstance(module, nn.Sequential) and in_list and repeated
            return not small_chain or large or _repeats(module)
        if in_list and repeated:
            stage = len(set(alike)) == len(alike)  # layers are alike; stages of layers differ in width or depth
            return (large or stage) and _repeats(module)
        if _repeats(module):
            return True
        return large and not _is_whole(module) and not (in_list and _holds_layers(module))


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential)


def _is_whole(module: nn.Module) -> bool:
    """A module of torch's own that computes with its children's parameters, or a leaf."""
    if _is_container(module) or type(module) is nn.Module:
        return False
    return next(module.children(), None) is None or type(module).__module__.startswith("torch.nn.")


def _repeats(module: nn.Module) -> bool:
    """Whether a container somewhere inside holds several modules of one class that have parts of their own."""
    for inner in module.modules():
        if _is_container(inner):
            kinds = [type(child) for child in inner.children() if next(child.children(), None) is not None]
            if len(kinds) > len(set(kinds)):
                return True
    return False


def _holds_layers(module: nn.Module) -> bool:
    """Whether a lone module of a list is a layer, not a wrapper around one module that does the work."""
    return sum(1 for child in module.children() if next(child.parameters(), None) is not None) > 1


def _num_elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
