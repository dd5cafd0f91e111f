"""Recipes: training loops short enough to read, copy and change.

Each trains in a run folder (`ServiceClient.open_run`), so that it continues when it is run again.
See docs/training.md.
"""

from tinkex.recipes.batches import Batches as Batches
from tinkex.recipes.dpo import Pair as Pair, dpo_loss as dpo_loss, train_dpo as train_dpo
from tinkex.recipes.evaluation import (
    Evaluation as Evaluation,
    evaluate as evaluate,
    learnt_weight as learnt_weight,
)
from tinkex.recipes.rl import group_data as group_data, train_rl as train_rl
from tinkex.recipes.schedules import (
    Schedule as Schedule,
    constant as constant,
    cosine as cosine,
    linear as linear,
)
from tinkex.recipes.serving import (
    find_sampler as find_sampler,
    open_service as open_service,
    server_of as server_of,
)
from tinkex.recipes.supervised import train_supervised as train_supervised
