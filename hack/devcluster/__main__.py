"""Command line: python -m devcluster up|down|status|env|shell --name NAME, or build GROUP."""

import os
import shlex
import subprocess
import sys
from typing import Annotated

import typer

from devcluster import debian, gobuild
from devcluster.cluster import Cluster, names
from devcluster.commands import StepError
from devcluster.paths import cache_dir
from devcluster.progress import Progress

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Name = Annotated[str, typer.Option(help="Which cluster; several can stand beside each other.")]


@app.command()
def up(name: Name = "perch", gpus: Annotated[int | None, typer.Option(help="nvidia.com/gpu of the node")] = None) -> None:
    """Make a cluster, or finish or repair it."""
    cluster = Cluster(name, gpus)
    cluster.up()
    print(f"cluster {name} is ready; its kubeconfig is {cluster.kubeconfig}")


@app.command()
def down(name: Name = "perch") -> None:
    """Remove a cluster and all that belongs to it."""
    Cluster(name).down()


@app.command()
def status(name: Name = "") -> None:
    """Show what runs, of one cluster or of all."""
    for each in [name] if name else names():
        cluster = Cluster(each)
        host, port = cluster.gateway_address()
        print(f"{each}: gateway {host}:{port}, S3 {cluster.s3.host_endpoint}, Prometheus {cluster.prometheus_url()}")
        print(f"  kubeconfig {cluster.kubeconfig}")
        for component, runs in cluster.components().items():
            print(f"  {'runs   ' if runs else 'STOPPED'} {component}")


@app.command()
def env(name: Name = "perch") -> None:
    """Print export lines, for `eval "$(python -m devcluster env)"`."""
    for key, value in Cluster(name).env().items():
        print(f"export {key}={shlex.quote(value)}")


@app.command()
def shell(name: Name = "perch") -> None:
    """Open a shell in which kubectl and helm talk to the cluster."""
    program = os.environ.get("SHELL", "/bin/sh")
    raise typer.Exit(subprocess.run([program], env={**os.environ, **Cluster(name).env()}, check=False).returncode)


@app.command()
def stop(component: str, name: Name = "perch", kill: bool = False) -> None:
    """Stop one component, to see what a fault does."""
    Cluster(name).stop_component(component, kill=kill)


@app.command()
def start(component: str, name: Name = "perch") -> None:
    """Start a stopped component again."""
    Cluster(name).start_component(component)


@app.command()
def build(groups: Annotated[list[str], typer.Argument(help="Folders of hack/go.")]) -> None:
    """Build some of the programs into the cache, so that what uses them need not wait."""
    known = {group.name: group for group in (*gobuild.GROUPS, gobuild.KIND)}
    if unknown := set(groups) - set(known):
        raise StepError(f"there is no {', '.join(sorted(unknown))} in hack/go; there are {', '.join(known)}")
    with Progress(cache_dir() / "logs") as progress:
        debian.install_missing(progress)
        gobuild.build_missing([known[name] for name in groups], progress)


def main() -> None:
    try:
        app(prog_name="devcluster")
    except StepError as error:
        sys.exit(f"devcluster: {error}")
    except subprocess.CalledProcessError as error:
        notes = "\n".join(getattr(error, "__notes__", []))
        sys.exit(f"devcluster: `{' '.join(error.cmd[:6])}` ended with {error.returncode}: {notes}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
