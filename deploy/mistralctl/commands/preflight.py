"""Asks the clouds, before money is spent, whether their quotas let a plan's machine run. What they do not say stops nobody."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from mistralctl.clouds import quotas as of_cloud
from mistralctl.errors import Exit, UserError, figure
from mistralctl.plan import SMALLEST_CPU_NODE, Option, Plan
from mistralctl.prices import offers
from mistralctl.quotas import Need, Quota, Unknown, Wanted, table, too_small_everywhere

SECONDS = 5.0  # for every cloud and region together; what has not answered by then is unknown

Place = tuple[Option, str]
T = TypeVar("T")


def _at_once(asked: Mapping[str, Callable[[], T]], deadline: float) -> dict[str, T | Unknown]:
    """What each function returned, or why it returned nothing; they run side by side, and nobody waits longer than the deadline."""
    late = Unknown(f"no answer within {SECONDS:.0f} s")
    found: dict[str, T | Unknown] = dict.fromkeys(asked, late)

    def run(key: str, function: Callable[[], T]) -> None:
        try:
            found[key] = function()
        except Unknown as error:
            found[key] = error
        except Exception as error:  # noqa: BLE001 - an SDK's own; a preflight that fails must not stop anybody
            found[key] = Unknown(f"{type(error).__name__}: {str(error)[:120]}")

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in asked.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return dict(found)


def _wanted(option: Option, spot: bool) -> Wanted:
    sizes = {offer.instance_type: offer.vcpus for offer in offers(option.cloud)}
    vcpus = sizes.get(option.instance_type or "", 0.0) if option.accelerator else float(SMALLEST_CPU_NODE[0])
    return Wanted(option.cloud, option.instance_type or "", option.accelerator, option.count, vcpus, spot)


def _unknown(option: Option, region: str, why: str) -> Quota:
    return Quota(option.cloud, region, option.label, "", "", 0, "", None, None, "", why)


def _ask(places: Sequence[Place], spot: bool, deadline: float) -> list[Quota]:
    """The quotas of these places; each region of a cloud is asked once, for all machines that may run there."""
    asking = {cloud: module for cloud in dict.fromkeys(option.cloud for option, _ in places) if (module := of_cloud(cloud))}
    needs = {place: asking[place[0].cloud].needs(_wanted(place[0], spot)) for place in places if place[0].cloud in asking}
    wanted: dict[tuple[str, str], dict[str, Need]] = {}
    for (option, region), every in needs.items():
        wanted.setdefault((option.cloud, region), {}).update({need.code: need for need in every})
    answers = _at_once(
        {
            f"{cloud}/{region}": partial(asking[cloud].ask, region, list(every.values()))
            for (cloud, region), every in wanted.items() if every
        },
        deadline,
    )  # fmt: skip
    found: list[Quota] = []
    for option, region in places:
        every = needs.get((option, region), ())
        if not every:
            what = f"quota of {option.instance_type}{' as spot' if spot else ''}" if option.cloud in asking else "quotas there"
            found.append(_unknown(option, region, f"mistralctl knows no {what}"))
            continue
        answer = answers[f"{option.cloud}/{region}"]
        for need in every:
            limit, used, why = None, None, ""
            if isinstance(answer, Unknown):
                why = " ".join(str(answer).split())
            elif need.code in answer:
                limit, used = answer[need.code]
            else:
                why = "it is not in the cloud's list"
            found.append(
                Quota(option.cloud, region, option.label, need.code, need.name, need.amount, need.unit, limit, used,
                      asking[option.cloud].page(region, need.code), why)
            )  # fmt: skip
    return found


def _first(plan: Plan) -> list[Place]:
    """The region that was asked for; else those whose prices are known, cheapest first: there the launch begins."""
    places: list[Place] = []
    for option in plan.options:
        known = [offer.region for offer in offers(option.cloud) if offer.instance_type == option.instance_type]
        places += [(option, region) for region in ([plan.spec.region] if plan.spec.region else dict.fromkeys(known))]
    return places


def _others(plan: Plan, asked: Sequence[Place], deadline: float) -> list[Quota]:
    """The quotas in every other region, to which SkyPilot goes on when the first ones refuse."""
    known = {(option.cloud, region) for option, region in asked}
    clouds = dict.fromkeys(option.cloud for option in plan.options)
    regions = _at_once({cloud: asking.regions for cloud in clouds if (asking := of_cloud(cloud))}, deadline)
    places, found = [], []
    for option in plan.options:
        there = regions.get(option.cloud, ())
        if isinstance(there, Unknown):
            found.append(_unknown(option, "elsewhere", str(there)))
        else:
            places += [(option, region) for region in there if (option.cloud, region) not in known]
    return [*_ask(places, plan.spec.spot, deadline), *found]


def run(plan: Plan) -> tuple[Quota, ...]:
    """The quotas of a plan's places, within SECONDS: of the likely regions and, if none of those is enough, of all others."""
    if plan.local:
        return ()
    deadline = time.monotonic() + SECONDS
    first = _first(plan)
    found = _ask(first, plan.spec.spot, deadline)
    if too_small_everywhere(found) and not plan.spec.region:
        found += _others(plan, first, deadline)
    return tuple(found)


def check(plan: Plan, note: Callable[[str], None], *, limits_only: bool = False) -> None:
    """UserError if the quotas are known to be too small in every place of the plan; `note` is told of those that are in some.

    `limits_only`: what is in use is not counted, because a machine of our own goes first.
    """
    quotas = run(plan)
    if limits_only:
        quotas = tuple(replace(quota, used=0.0) for quota in quotas)
    small = [quota for quota in quotas if quota.enough is False]
    pages = list(dict.fromkeys(quota.page for quota in small))
    if too_small_everywhere(quotas):
        raise UserError(
            f"no quota lets {plan.name} run anywhere, so nothing was launched; ask for more at {pages[0]}, or allow another "
            "--cloud, --region or --accelerators (--offline does not ask)",
            Exit.CLOUD,
            details="\n".join(f"  {line}" for line in table(small)),
        )
    for quota in small:
        note(
            f"{quota.cloud} {quota.region}: {quota.code} {quota.name} is too small for {quota.machine} (needs {figure(quota.needs)} "
            f"{quota.unit}, limit {figure(quota.limit or 0)}); ask for more at {quota.page}"
        )  # fmt: skip
