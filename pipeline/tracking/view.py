"""What follows a run's ledger: console, W&B, TensorBoard. The ledger is the truth, and a view never stops training."""

from pathlib import Path


class View:
    """Follows the ledger of a run on rank 0. Each method may do nothing; none raises for what breaks in the view."""

    def log(self, row: dict) -> None:
        """A "train" or "eval" row that the ledger has just taken."""

    def before_rewind(self, last_steps: dict[str, int]) -> None:
        """The run is about to go back, and the ledger to forget rows. last_steps: kind -> its last step so far."""

    def after_rewind(self) -> None:
        """The ledger has forgotten them."""

    def show(self, pictures: list[Path], step: int) -> None:
        """The final report's pictures (PNG files); the run has done `step` steps."""

    def alert(self, text: str) -> None:
        """The run needs attention."""

    def close(self) -> None:
        """The process ends: everything has to reach the disk or the server."""
