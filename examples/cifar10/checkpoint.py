# One checkpoint an epoch, by orbax: written beside its final place, renamed when complete. A
# save that was killed leaves only a temporary folder, which the next run clears away.

from pathlib import Path

import jax
import orbax.checkpoint as ocp


class Checkpoints:
    def __init__(self, folder: Path, keep: int):
        self.manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=False
            ),
        )

    def save(self, epoch: int, state) -> None:
        self.manager.save(epoch, args=ocp.args.StandardSave(named(state)))

    def latest(self) -> int:
        """The last complete epoch, 0 if there is none."""
        return self.manager.latest_step() or 0

    def restore(self, epoch: int, state):
        """The state of `epoch`, laid over the devices as `state` is."""
        target = named(state)
        saved = self.manager.restore(epoch, args=ocp.args.StandardRestore(target))
        return jax.tree.unflatten(jax.tree.structure(state), [saved[name] for name in target])

    def close(self) -> None:
        self.manager.close()


def named(state) -> dict:
    """Path → array, so that linen's and nnx's states are stored alike, and readable."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree.leaves_with_path(state)
    }
