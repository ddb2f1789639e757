"""Can a recipe be trained by so many ranks, on this device? Said before anything is opened or built."""

from pipeline.augment.mixing import check_mixing
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.model.sizes import check_image_sizes, check_smallest_piece
from pipeline.training.ranks.world import World


def check_network(config: Config, world: World) -> None:
    """Raises UserError if the network can't be trained on these images, so many at once, or on this device."""
    check_image_sizes(config)
    check_smallest_piece(config, config.train.global_batch_size // world.size)
    if config.model.sync_batchnorm and world.device.type == "cpu":
        raise UserError("--model.sync_batchnorm needs GPUs, torch has none for CPUs; give --model.sync_batchnorm false")


def check_batch(config: Config, world_size: int) -> None:
    """Raises UserError if the global batch can't be shared equally among the ranks."""
    size = config.train.global_batch_size
    if size % world_size:
        raise UserError(
            f"--train.global_batch_size {size} is not divisible by the {world_size} ranks; "
            f"give a multiple, e.g. {-(-size // world_size) * world_size}"
        )
    check_mixing(config.augment, size, world_size)
