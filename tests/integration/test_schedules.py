"""Real nodes whose teachers change from exchange to exchange."""

import json


async def test_three_sites_learn_from_one_teacher_at_a_time_and_hold_them_all(sites):
    group = sites.make("a", "b", "c", training={"num_steps": 150})
    for site in group:
        site.set(topology="one-peer-exponential")
    await sites.start_together(*group)
    assert [await site.wait() for site in group] == [0, 0, 0], "".join(site.log() for site in group)
    names = [site.name for site in group]
    for rank, site in enumerate(group):
        before, beyond = names[rank - 1], names[rank - 2]
        told = json.loads((site.run_folder / "group.json").read_text())
        assert told["teachers"] == [{before: 1.0}, {beyond: 1.0}]
        assert told["num_students"] == 2
        assert {record["origin"] for record in site.all("frame-fetched")} == {before, beyond}
        assert not site.all("refused")
