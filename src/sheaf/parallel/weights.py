"""Backward in two parts: gradients of what came from earlier stages first, those of the weights later.

Qi et al., 2024, "Zero Bubble Pipeline Parallelism" (arXiv:2401.10241). A node of the graph that leads both to an input
and to weights (a product, a norm) computes each only when asked. So the first part runs the nodes that lead to inputs,
and keeps the gradients with which it came to those of them that lead to weights too; the second runs only these again,
from what was kept, to the weights. Nothing is computed twice but what PyTorch computes at once in both.

It is not done, and all is computed at once, where a weight is used by two nodes of which one leads to the other (its
gradient would count twice), where such a node is a custom autograd.Function, and where a tensor has a gradient hook
(both would run twice); nor where blocks run again, nor with ZeRO-2 and 3, whose rounds are one backward each.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge


class Later:
    """The backward of weights that is left: call it once."""

    def __init__(self, groups: list[tuple[list[tuple[GradientEdge, Tensor]], list[Tensor] | None]]) -> None:
        self._groups = groups

    def __call__(self) -> None:
        """Accumulate the gradients of the weights; hooks that follow accumulation run."""
        for roots, weights in self._groups:
            edges, gradients = [edge for edge, _ in roots], [gradient for _, gradient in roots]
            torch.autograd.backward(edges, gradients, retain_graph=weights is not None, inputs=weights)
        self._groups = []


def inputs_first(roots: Sequence[Tensor], gradients: Sequence[Tensor], leaves: Sequence[Tensor]) -> Later | None:
    """Give ``leaves`` their gradients; None, and nothing done, where the two cannot be told apart."""
    edges = [get_gradient_edge(root) for root in roots]
    if not leaves:
        return Later([(list(zip(edges, gradients, strict=True)), None)])
    graph = _Graph([edge.node for edge in edges], {id(leaf) for leaf in leaves})
    groups = graph.groups([edge.node for edge in edges])
    if groups is None:
        return None
    come: dict[Node, tuple[Tensor | None, ...]] = {}
    handles = [
        node.register_prehook(partial(_note, come, node))
        for members, _ in groups
        for node in members
        if node in graph.leading
    ]
    there = [place for place, edge in enumerate(edges) if edge.node in graph.leading]
    if there:
        found = torch.autograd.grad(
            [roots[place] for place in there],
            leaves,
            [gradients[place] for place in there],
            retain_graph=True,
            allow_unused=True,
        )
        for leaf, gradient in zip(leaves, found, strict=True):
            leaf.grad = gradient
    for handle in handles:
        handle.remove()
    left: list[tuple[list[tuple[GradientEdge, Tensor]], list[Tensor] | None]] = []
    for members, weights in groups:
        starts = [
            (GradientEdge(node, place), gradient)
            for node in members
            for place, gradient in enumerate(come.get(node, ()))
            if gradient is not None
        ]
        starts += [
            (edge, gradient)
            for edge, gradient in zip(edges, gradients, strict=True)
            if edge.node in members and edge.node not in graph.leading
        ]
        if starts:
            left.append((starts, weights))
    return Later(left)


def _note(come: dict[Node, tuple[Tensor | None, ...]], node: Node, gradients: tuple[Tensor | None, ...]) -> None:
    come[node] = gradients


class _Graph:
    """What autograd recorded behind some nodes; ``leading`` are those that lead to an input."""

    def __init__(self, starts: Sequence[Node], inputs: set[int]) -> None:
        self.after: dict[Node, list[Node]] = {}
        self.leading: set[Node] = set()
        self._weights: dict[Node, dict[int, Tensor]] = {}
        stack: list[tuple[Node, bool]] = [(node, False) for node in starts]
        while stack:
            node, done = stack.pop()
            if done:
                self._close(node, inputs)
            elif node not in self.after:
                self.after[node] = [after for after, _ in node.next_functions if after is not None]
                stack.append((node, True))
                stack += [(after, False) for after in self.after[node]]

    def groups(self, starts: Sequence[Node]) -> list[tuple[list[Node], list[Tensor]]] | None:
        """Nodes from which weights are reached without coming by inputs' nodes, with these weights; nodes that share a
        weight are together. None where they cannot be run by themselves.
        """
        reached = {node: self._reached(node) for node in self.after if node in self.leading}
        reached = {node: weights for node, weights in reached.items() if weights}
        if any(isinstance(node, BackwardCFunction) for node in reached):
            return None
        reached |= {node: self._weights[node] for node in starts if node not in self.leading and self._weights[node]}
        by_weight: dict[int, list[Node]] = {}
        for node, weights in reached.items():
            for weight in weights:
                by_weight.setdefault(weight, []).append(node)
        made: list[tuple[list[Node], list[Tensor]]] = []
        left = dict(reached)
        while left:
            members: list[Node] = []
            weights: dict[int, Tensor] = {}
            open_nodes = [next(iter(left))]
            while open_nodes:
                node = open_nodes.pop()
                if left.pop(node, None) is None:
                    continue
                members.append(node)
                weights |= reached[node]
                open_nodes += [other for weight in reached[node] for other in by_weight[weight]]
            if len(members) > 1 and any(self._leads(node, set(members)) for node in members):
                return None
            made.append((members, list(weights.values())))
        return made

    def _close(self, node: Node, inputs: set[int]) -> None:
        """All that follows a node is known."""
        variable: Any = getattr(node, "variable", None)
        after = self.after[node]
        if (variable is not None and id(variable) in inputs) or any(other in self.leading for other in after):
            self.leading.add(node)
            return
        weights = {id(variable): variable} if variable is not None else {}
        for other in after:
            weights |= self._weights[other]
        self._weights[node] = weights

    def _reached(self, node: Node) -> dict[int, Tensor]:
        weights: dict[int, Tensor] = {}
        for other in self.after[node]:
            if other not in self.leading:
                weights |= self._weights[other]
        return weights

    def _leads(self, node: Node, others: set[Node]) -> bool:
        """Whether one leads to another by nodes that lead to inputs."""
        met: set[Node] = set()
        stack = [other for other in self.after[node] if other in self.leading]
        while stack:
            other = stack.pop()
            if other in others:
                return True
            if other not in met:
                met.add(other)
                stack += [after for after in self.after[other] if after in self.leading]
        return False
