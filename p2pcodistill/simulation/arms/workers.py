"""The workers of one model: each computes gradients on the data of a site."""

from __future__ import annotations

from p2pcodistill.simulation.arms.learner import Learner
from p2pcodistill.simulation.arms.run import ArmRun


def make_workers(arm: ArmRun, *, has_lead: bool) -> list[Learner]:
    """One for each site, or as many as the arm wants: sites take turns. The first may have the arm's log and model.

    The workers of one site share its data between them.
    """
    num_workers = arm.config.num_workers or len(arm.sites)
    workers = []
    for index in range(num_workers):
        turn, place = divmod(index, len(arm.sites))
        site = arm.sites[place]
        num_at_site = len(range(place, num_workers, len(arm.sites)))
        workers.append(
            arm.learner(
                site,
                name=f"{site}+{turn}" if turn else site,
                is_lead=index == 0 and has_lead,
                tell=arm.tell() if index == 0 and has_lead else None,
                num_workers=num_workers,
                share=(turn, num_at_site),
            )
        )
    return workers
