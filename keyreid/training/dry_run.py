"""What a training would do, without doing it."""

import yaml

from keyreid.config import Config
from keyreid.shards.plan import TrainingPlan
from keyreid.shards.shard_set import ShardSet


def check_data(config: Config) -> tuple[ShardSet, TrainingPlan]:
    """The shards and the plan of a run; raises what is wrong with them."""
    shards = ShardSet.from_config(config.data)
    return shards, TrainingPlan(shards, config.data, config.clip, config.seed)


def describe_plan(config: Config) -> str:
    """The resolved configuration, and how long and how large the training would be."""
    from keyreid.checkpoints.start import start_network

    shards, plan = check_data(config)
    model = config.model
    if model.weights == "timm":  # nothing is downloaded for a plan
        model = model.model_copy(update={"weights": None})
    network = start_network(model, config.clip, plan.num_identities, len(shards.camera_index))
    steps = config.schedule.steps_per_epoch or plan.steps_per_epoch
    return (
        f"{yaml.safe_dump(config.model_dump(mode='json'), sort_keys=False)}\n"
        f"{plan.num_identities} training identities, {steps} steps an epoch, {steps * config.schedule.epochs} in all\n"
        f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters"
    )
