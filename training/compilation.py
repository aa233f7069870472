"""torch.compile for batches of any size."""

from torch.fx.experimental import _config as symbolic_shapes


def keep_equal_sizes_apart() -> None:
    """Let one compilation with `dynamic=True` serve every size of a batch.

    torch takes sizes that are equal in the first batch for the same one ("duck shapes"). Most molecules of QM9 have nine heavy
    atoms, and an atom has nine features: the next size would be compiled anew, for minutes.
    """
    symbolic_shapes.use_duck_shape = False
