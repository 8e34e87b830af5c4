"""Command line: python -m demo --name NAME. Ends with 1 if anything was not as it should be."""

import subprocess
import sys
from typing import Annotated

import typer
from rich.console import Console

from demo.narrator import Narrator
from demo.story import DemoFailed, Story
from demo.watch import NotReady
from devcluster import Cluster
from devcluster.commands import StepError
from perch_exporter.failure import StepFailed

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(name: Annotated[str, typer.Option(help="Which cluster; it is made if need be, and left running.")] = "demo") -> None:
    """Tell and check the whole story: export, serve, split, promote, roll back."""
    console = Console(highlight=False)
    try:
        Story(Cluster(name), Narrator(console)).play()
    except (DemoFailed, NotReady, StepError, StepFailed, TimeoutError) as error:
        said = str(error)
    except subprocess.CalledProcessError as error:
        said = f"`{' '.join(error.cmd[:8])}` ended with {error.returncode}: {' '.join(getattr(error, '__notes__', []))}"
    except KeyboardInterrupt:
        text = f"\nStopped. `make demo NAME={name}` begins anew on the same cluster, `make down NAME={name}` removes it."
        console.print(text, soft_wrap=True)
        sys.exit(130)
    else:
        return
    console.print("\n[bold red]The demo failed.[/]")
    console.print(said, markup=False, soft_wrap=True)
    text = f"The cluster is left for a look: `make shell NAME={name}`; `make down NAME={name}` removes it."
    console.print(text, soft_wrap=True)
    sys.exit(1)


if __name__ == "__main__":
    app()
