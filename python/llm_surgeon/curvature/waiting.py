"""Products of small matrices that wait for each other, to be added up by one launch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from surgeon_kernels import GramProduct, gram_accumulate_each_

# Products, and bytes of their rows, that wait at most (estimates): a block's, unless batches are so large that its
# products fill a GPU one by one.
_MOST, _MOST_BYTES = 16, 1 << 28


def is_small(product: GramProduct) -> bool:
    """True on a GPU for products whose sums are not packed: their launches take longer than they do."""
    return product.x.is_cuda and not getattr(product.out, "packed", False)


class WaitingProducts:
    """Products of one device that wait, from the second time on that one of a name is asked for.

    Their rows are kept meanwhile, and a model might overwrite them: the first time they are only watched, and those of
    a name that does so are never kept.
    """

    def __init__(self, small: Callable[[GramProduct], bool] = is_small) -> None:
        self._small = small
        self._unchanged: dict[str, bool] = {}
        self._watched: list[tuple[str, Tensor, int]] = []
        self._products: list[GramProduct] = []

    def takes(self, name: str, product: GramProduct) -> bool:
        """Let the product wait; False where it has to be added at once, by the caller."""
        waits = self._unchanged.get(name)
        if waits is False or not self._small(product):
            return False
        self._watched.append((name, product.x, product.x._version))
        if waits:
            self._products.append(product)
        if len(self._watched) == _MOST or sum(x.nbytes for _, x, _ in self._watched) >= _MOST_BYTES:
            self.add_up()
        return bool(waits)

    def add_up(self) -> None:
        """Add what waits."""
        gram_accumulate_each_(self._products)
        for name, x, version in self._watched:
            unchanged = x._version == version
            assert unchanged or not self._unchanged.get(name), f"{name} was overwritten"
            self._unchanged[name] = unchanged
        self._products, self._watched = [], []
