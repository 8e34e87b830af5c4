"""The Git repository of the story's user: a scratch one, with one manifest, whose history is the model's release history."""

from pathlib import Path

from devcluster.commands import capture

MANIFEST = "digits.yaml"


class Repository:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.git("init", "--quiet", "--initial-branch=main")
        for key, value in {"user.name": "Perch demo", "user.email": "demo@perch.invalid", "commit.gpgsign": "false"}.items():
            self.git("config", key, value)

    @property
    def manifest(self) -> Path:
        return self.folder / MANIFEST

    def commit(self, text: str, message: str) -> str:
        """Writes the manifest and commits it; returns what changed in it."""
        self.manifest.write_text(text)
        self.git("add", MANIFEST)
        self.git("commit", "--quiet", f"--message={message}")
        return self.git("show", "--format=", "--unified=1", "HEAD")

    def revert(self, commits: int) -> None:
        """`git revert` of the newest commits, newest first."""
        self.git("revert", "--no-edit", f"HEAD~{commits}..HEAD")

    def log(self) -> str:
        return self.git("log", "--oneline", "--no-decorate")

    def git(self, *arguments: str) -> str:
        return capture(["git", "-C", self.folder, *arguments])
