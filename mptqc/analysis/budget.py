"""What a choice of bits costs, in the measures that a budget limits (METHOD, Greedy MP)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mptqc.analysis.bit_variables import Bits, BitVariable, Kind, Product
from mptqc.graph.packed_weights import table_bytes, tables_of, trellis_bytes, unpacking_bytes
from mptqc.recipe import Budget
from mptqc.reference.packing import MAX_BITS, Plane, packed_bytes

Cost = Callable[[Bits], float]


@dataclass(frozen=True)
class Measure:
    """A cost and its limit.

    Attributes:
        option: its name, for people.
        unit: likewise.
        limit: what the cost may be.
        cost: of a choice of bits.
        smooth: nearly the cost, but falling with every bit; what steps are priced by. None: the cost itself.
    """

    option: str
    unit: str
    limit: float
    cost: Cost
    smooth: Cost | None = None

    @property
    def price(self) -> Cost:
        """What steps are priced by."""
        return self.cost if self.smooth is None else self.smooth

    def missing(self, bits: Bits, start: Bits) -> float:
        """How much of the way from the start to the limit is still to go, 0..1; 0 where the limit holds."""
        way = self.cost(start) - self.limit
        return max(self.cost(bits) - self.limit, 0.0) / way if way > 0 else 0.0


@dataclass(frozen=True)
class FileBytes:
    """Bytes of the compiled file: of the weights' planes, of what widens them, and of all else.

    Attributes:
        variables: what bits are given to.
        rest: what no bits change.
        upper: of each variable, how many regions above the lowest its quantizer has at each width; missing: none.
        clipping: what an activation of fewer than 8 bits takes more than one of 8: its Clip.
        region: what each upper region takes.
        trellis: the bits of weights that a trellis codes.
        in_blocks: the file is for a kernel library, whose products read weights in blocks.
    """

    variables: tuple[BitVariable, ...]
    rest: int = 0
    upper: tuple[Mapping[int, int], ...] = ()
    clipping: int = 0
    region: int = 0
    trellis: frozenset[int] = frozenset()
    in_blocks: bool = False

    def __call__(self, bits: Bits) -> int:
        """Bytes at a choice of bits."""
        tables: set[Plane] = set()
        trellises: set[int] = set()
        total = self.rest
        for variable, number in zip(self.variables, bits, strict=True):
            if variable.kind is Kind.WEIGHT:
                total += packed_bytes(variable.elements, number) + unpacking_bytes(
                    number, by_trellis=number in self.trellis, in_blocks=self.in_blocks
                )
                tables |= set(tables_of(number, by_trellis=number in self.trellis))
                trellises |= {number} & self.trellis
        narrow, regions = self._narrow(bits)
        total += narrow * self.clipping + regions * self.region
        return total + sum(map(table_bytes, tables)) + sum(map(trellis_bytes, trellises))

    def fitted(self, bits: Bits, file_bytes: int) -> "FileBytes":
        """The same, right for a file of these bits that was written."""
        return replace(self, rest=self.rest + file_bytes - self(bits))

    def fitted_activations(self, files: Sequence[tuple[Bits, int]]) -> "FileBytes":
        """The same, `clipping` and `region` nearest to files with narrow activations that were written: bits, bytes."""
        plain = replace(self, clipping=0, region=0)
        counts = np.array([self._narrow(bits) for bits, _ in files], np.float64)
        missing = np.array([file_bytes - plain(bits) for bits, file_bytes in files], np.float64)
        clipping, region = np.linalg.lstsq(counts, missing, rcond=None)[0]
        return replace(self, clipping=round(clipping), region=round(region))

    def _narrow(self, bits: Bits) -> tuple[int, int]:
        """Activations of fewer than 8 bits, and all their upper regions."""
        narrow = [
            at for at, variable in enumerate(self.variables) if variable.kind is Kind.ACTIVATION and bits[at] < MAX_BITS
        ]
        return len(narrow), sum(self.upper[at].get(bits[at], 0) for at in narrow) if self.upper else 0


def average_bits(variables: Sequence[BitVariable], kind: Kind) -> Cost:
    """Mean bits of one kind, each variable counting by its elements."""
    elements = np.array([variable.elements if variable.kind is kind else 0 for variable in variables], np.float64)
    total = elements.sum()
    return lambda bits: float(elements @ np.array(bits)) / total


def weight_bytes(variables: Sequence[BitVariable]) -> Cost:
    """k/8 bytes a weight, without what widens them."""
    elements = np.array(
        [variable.elements if variable.kind is Kind.WEIGHT else 0 for variable in variables], np.float64
    )
    return lambda bits: float(elements @ np.array(bits)) / 8


def bit_operations(variables: Sequence[BitVariable], products: Sequence[Product]) -> Cost:
    """Σ multiplications · bits · bits over products."""
    place = {variable.name: at for at, variable in enumerate(variables)}
    left, right = (np.array([place[name] for name in names]) for names in _operand_names(products))
    multiplications = np.array([product.multiplications for product in products], np.float64)

    def cost(bits: Bits) -> float:
        chosen = np.array(bits)
        return float(multiplications @ (chosen[left] * chosen[right]))

    return cost


def _operand_names(products: Sequence[Product]) -> tuple[list[str], list[str]]:
    return [product.left for product in products], [product.right for product in products]


def measures_of(
    budget: Budget, variables: Sequence[BitVariable], products: Sequence[Product], file_bytes: FileBytes
) -> list[Measure]:
    """What the budget limits; a largest loss of accuracy is no measure, there the file is to be as small as it can."""
    found = []
    if budget.weight_average is not None:
        cost = average_bits(variables, Kind.WEIGHT)
        found.append(Measure("average weight bits", "bits", budget.weight_average, cost))
    if budget.activation_average is not None:
        cost = average_bits(variables, Kind.ACTIVATION)
        found.append(Measure("average activation bits", "bits", budget.activation_average, cost))
    if budget.max_bytes is not None:
        found.append(Measure("max bytes", "bytes", budget.max_bytes, file_bytes, weight_bytes(variables)))
    if budget.max_bops is not None:
        found.append(Measure("max bops", "bit operations", budget.max_bops, bit_operations(variables, products)))
    if budget.max_accuracy_drop is not None:
        cost = weight_bytes(variables)
        found.append(Measure("weights", "bytes", cost(tuple(variable.widths[0] for variable in variables)), cost))
    return found


def average_of(elements: Mapping[str, int], bits: Mapping[str, int], kind: Kind) -> float:
    """Mean bits of one kind from a plan's elements; 0 if there are none."""
    chosen = [name for name in elements if name.endswith("/weight") == (kind is Kind.WEIGHT)]
    total = sum(elements[name] for name in chosen)
    return sum(elements[name] * bits[name] for name in chosen) / max(total, 1)
