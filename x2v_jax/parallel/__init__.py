"""Many devices: meshes and the rules by which trees of arrays are laid out on them."""

from x2v_jax.parallel.mesh import Mesh, place_batch, place_tree, tree_shardings

__all__ = ["Mesh", "place_batch", "place_tree", "tree_shardings"]
