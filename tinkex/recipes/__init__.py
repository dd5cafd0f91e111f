"""Recipes: training loops that are short enough to be read, and to be copied and changed.

Each trains in a run folder (`ServiceClient.open_run`), so that it continues when it is run again.
docs/training.md has the whole story.
"""

from tinkex.recipes.batches import Batches as Batches, count_steps as count_steps
from tinkex.recipes.evaluation import Evaluation as Evaluation, evaluate as evaluate
from tinkex.recipes.schedules import (
    constant as constant,
    cosine as cosine,
    linear as linear,
)
from tinkex.recipes.serving import (
    find_sampler as find_sampler,
    open_service as open_service,
)
from tinkex.recipes.supervised import train_supervised as train_supervised
