"""Do the temporal tasks lower cross-modal retrieval because the network is small? On the toy world.

    python -m studies.capacity                     the runs that studies/results/capacity.csv lacks, then
                                                   the tables and the figure
    python -m studies.capacity --only "width 16"   only these networks
    python -m studies.capacity --table --figures

The methods are xid, temporal and robust_temporal of studies.both. Their networks have stems of 16, 32 and 48
channels; the one of 16 also trains for twice as many epochs. Each is run without faulty pairs and with 30 %.
"""

from . import runs

if __name__ == "__main__":
    arguments = runs.command_line(__doc__)

from . import both, figures, temporal

METHODS = ("xid", "temporal", "robust_temporal")
SHARES = (0.0, 0.3)
LONGER = "width 16, twice as long"
NETWORKS = {
    **{f"width {width}": (f"model.width={width}",) for width in (16, 32, 48)},
    LONGER: ("model.width=16", "optim.epochs=80", "loss.warmup_epochs=40"),
}


def plan(seeds):
    return [
        runs.Run(
            {"method": method, "faulty": f"{share:g}", "network": network},
            seed,
            (f"toy.faulty={share:g}", *both.METHODS[method], *settings),
        )
        for seed in seeds
        for network, settings in NETWORKS.items()
        for share in reversed(SHARES)
        for method in METHODS
    ]


def tables(rows):
    text = {}
    for share in SHARES:
        lines = []
        for network in NETWORKS:
            for method in METHODS:
                if selected := runs.select(rows, method=method, faulty=f"{share:g}", network=network):
                    lines.append(
                        [network, method, *((selected, column) for column in both.SHORT), str(len(selected))]
                    )
        head = [f"{share:.0%} faulty", "", *(temporal.MEASURES[column] for column in both.SHORT), "runs"]
        text[f"capacity-{share:g}"] = runs.table(head, lines)
    return text


def draw(rows, images, folder, arguments):
    shown = {column: f"{temporal.MEASURES[column]}, %" for column in both.SHORT}
    at_30 = runs.select(rows, faulty="0.3")
    networks = {name: name for name in NETWORKS if runs.select(rows, network=name)}
    yield figures.bars(images / "capacity.png", at_30, METHODS, shown, ("network", networks))


STUDY = runs.Study("capacity", "toy_temporal", both.BASE, plan, temporal.measure, tables, draw)

if __name__ == "__main__":
    runs.main(STUDY, arguments)
