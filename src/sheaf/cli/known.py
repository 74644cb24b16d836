"""``sheaf known``: the clusters that ship with Sheaf."""

import click
from rich.console import Console

from sheaf.cli.answer import Answer
from sheaf.cli.options import json_option
from sheaf.cli.show import described


@click.command(short_help="List the clusters that ship with Sheaf.")
@json_option
def known(as_json: bool) -> None:
    """List the clusters that ship with Sheaf, for `sheaf plan --cluster NAME` (or NAME:HOSTS)."""
    with Answer(as_json=as_json) as answer:
        from sheaf.cluster import known as names
        from sheaf.cluster import read

        clusters = {name: read(name) for name in names()}

        def show(console: Console) -> None:
            for cluster in clusters.values():
                first, *links = described(cluster)
                console.print("\n  ".join([first, *links]), markup=False, soft_wrap=True)

        answer.give({"known": {name: described(cluster) for name, cluster in clusters.items()}}, show)
