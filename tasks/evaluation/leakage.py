"""Which subjects the models of a release were trained or selected on, so that they stay out of its evaluation."""

from collections.abc import Mapping, Sequence

import numpy as np

from schemas.errors import BadModelError
from schemas.releases import ModelRef
from storage.location import Location
from tasks.checkpoints import stored_checkpoint


def training_subjects(
    store: Location, names: Sequence[str], models: Mapping[str, ModelRef]
) -> tuple[np.ndarray, dict[str, str]]:
    """Return which subjects any model was trained or selected on, and which models do not record it.

    Args:
        store: the store that holds the models.
        names: subjects.
        models: mode → model.

    Returns:
        bool `[names]`; and mode → reason, for each model that does not record its training subjects.

    Raises:
        StoreError: a model is missing.
    """
    seen = np.zeros(len(names), bool)
    unknown = {}
    for mode, model in models.items():
        try:
            seen |= stored_checkpoint(store, model).has_seen(names)
        except BadModelError as error:
            unknown[mode] = str(error)
    return seen, unknown
