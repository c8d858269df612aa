"""Removal: whether a release may lack so much of what is served, or quarantine so many rows. Pure decisions.

A disk that is not mounted, a folder that is half synchronised or a column of NaN must not empty what is served, and no
metric shows it: only subjects that both releases have are compared there. `[gate]` limits the shares; a mode that is
served leaves only by name. What was removed is counted by `tasks.changes`, the metrics decide in `tasks.gate`.
"""

from collections.abc import Iterable

from reports.text import removal_sentence
from schemas.releases import Release
from schemas.reports import Changes, DataQuality, GateDecision, LimitResult
from schemas.settings import GateSettings


def limit_removal(
    decision: GateDecision,
    changes: Changes | None,
    data: DataQuality,
    served: Release | None,
    settings: GateSettings,
    *,
    allowed: bool,
) -> GateDecision:
    """Return the decision of the gate, rejected where a limit is exceeded or a served mode is missing.

    Args:
        decision: that over the metrics.
        changes: since the served release; None for a first release, of which only the quarantined share is limited.
        data: where the rows of this run have gone.
        served: the release that is served.
        settings: the limits, and the modes that may leave.
        allowed: whether this run may exceed the limits. Modes leave by `drop_modes` alone.
    """
    limits = [
        *(_removed(changes, settings) if changes is not None else []),
        _quarantined(data, served.data if served is not None else None, settings.max_quarantined),
    ]
    missing = _missing(changes.modes_removed if changes is not None else [], settings)
    decision = decision.replaced(changes=changes, limits=limits, missing_modes=missing, removal_allowed=allowed)
    exceeded = [limit for limit in limits if limit.exceeded]
    if not exceeded and not missing:
        return decision
    sentence = removal_sentence(exceeded, missing, changes.since if changes is not None else None, allowed=allowed)
    if not _is_blocked(limits, missing, allowed=allowed):
        return decision.replaced(reason=f"{decision.reason}; {sentence}")
    return decision.replaced(
        promoted=False,
        reason=sentence if decision.promoted else f"{sentence}; {decision.reason}",
        compared_with=changes.since if changes is not None else None,
    )


def is_allowed_now(release: Release, settings: GateSettings, *, allowed: bool) -> bool:
    """Return whether a release that was rejected for what it removes would pass that check in this run."""
    gate = release.gate
    if gate.promoted or release.serving or not _is_blocked(gate.limits, gate.missing_modes, gate.removal_allowed):
        return False
    return not _is_blocked(gate.limits, _missing(gate.missing_modes, settings), allowed)


def _is_blocked(limits: Iterable[LimitResult], missing: Iterable[str], allowed: bool) -> bool:
    return bool(list(missing)) or (not allowed and any(limit.exceeded for limit in limits))


def _missing(modes: Iterable[str], settings: GateSettings) -> list[str]:
    return [mode for mode in modes if mode not in settings.drop_modes]


def _removed(changes: Changes, settings: GateSettings) -> list[LimitResult]:
    found = [
        LimitResult(
            setting="max_removed_rows",
            count=changes.rows_removed,
            total=changes.rows_before,
            limit=settings.max_removed_rows,
        ),
        LimitResult(
            setting="max_removed_shards",
            count=changes.shards_removed,
            total=changes.shards_before,
            limit=settings.max_removed_shards,
        ),
    ]
    if changes.subjects_before is not None:
        found.append(
            LimitResult(
                setting="max_removed_subjects",
                count=changes.subjects_removed,
                total=changes.subjects_before,
                limit=settings.max_removed_subjects,
            )
        )
    return found


def _quarantined(data: DataQuality, before: DataQuality | None, limit: float) -> LimitResult:
    return LimitResult(
        setting="max_quarantined",
        count=data.rows_unusable,
        total=data.rows_read + data.rows_in_bad_shards,
        share_before=0.0 if before is None else before.share_unusable,
        limit=limit,
    )
