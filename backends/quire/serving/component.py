"""What the components have in common: what Triton tells them, and the server that they belong to."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quire.interface import EnginePlacement
from quire.serving.rendezvous import Rendezvous
from quire.serving.watchdog import exit_with_server, server_of_this_stub
from quire.settings import ServingSettings


@dataclass(frozen=True, slots=True)
class ComponentArguments:
    """What Triton tells a model when it loads it, as far as it matters here."""

    model_name: str
    model_version: str
    repository: Path
    """The folder of all models."""
    parameters: Mapping[str, str]
    """From the model's config.pbtxt."""

    @classmethod
    def parse(cls, args: Mapping[str, str]) -> ComponentArguments:
        """Read what Triton passes to `TritonPythonModel.initialize`."""
        config = json.loads(args["model_config"])
        return cls(
            model_name=args["model_name"],
            model_version=args["model_version"],
            repository=Path(args["model_repository"]).parent,
            parameters={name: value["string_value"] for name, value in config.get("parameters", {}).items()},
        )

    @property
    def files_dir(self) -> Path:
        """The folder with this model's files."""
        return self.repository / self.model_name / self.model_version

    @property
    def engine_placement(self) -> EnginePlacement:
        """Where this repository's engine runs.

        Raises:
            StartupError: the repository doesn't say.
        """
        return EnginePlacement.read(self.parameters)

    @property
    def engine_dir(self) -> Path:
        """The folder with the engine and its manifest, whichever model has it."""
        return self.repository / self.engine_placement.engine_owner / self.model_version

    def settings(self) -> ServingSettings:
        """The serving settings of this start.

        Raises:
            SettingsError: one of them is malformed.
        """
        return ServingSettings.read(self.parameters, os.environ)


def join_server() -> Rendezvous:
    """Open the rendezvous of the server whose stub this process is, and see to it that they end together.

    Raises:
        StartupError: the folder cannot be used.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    server_pid = server_of_this_stub()
    rendezvous = Rendezvous.for_server(server_pid)
    exit_with_server(server_pid, rendezvous.close)
    return rendezvous
