"""`frontalis init`: a folder with the two files that a nightly schedule needs."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from frontalis.app import command
from schemas.errors import SettingsError

CHECKOUT = Path(__file__).parents[2]


@command(kept="a file may be missing; run the same command again")
def init(
    folder: Annotated[str, typer.Argument(help="Folder for pipeline.toml and prefect.yaml; may exist.")],
    source: Annotated[str | None, typer.Option(help="The source to write into pipeline.toml.")] = None,
    store: Annotated[str | None, typer.Option(help="The store to write into pipeline.toml.")] = None,
) -> None:
    """Write pipeline.toml and prefect.yaml, to edit and then deploy."""
    target, templates = Path(folder).absolute(), CHECKOUT / "deployments"
    if not (templates / "prefect.yaml").is_file():
        raise SettingsError(f"{templates}: is missing; run `frontalis init` from a checkout.")
    files = {name: target / name for name in ("pipeline.toml", "prefect.yaml")}
    for file in files.values():
        if file.exists():
            raise SettingsError(f"{file}: exists already; choose another folder, or remove it.")
    settings = (templates / "pipeline.example.toml").read_text("utf-8")
    for key, value in (("source", source), ("store", store)):
        if value is not None:
            uri = value if "://" in value else str(Path(value).absolute())
            line = f"{key} = {json.dumps(uri, ensure_ascii=False)}"
            settings = re.sub(rf'^{key} = "[^"]*"', line.replace("\\", r"\\"), settings, flags=re.MULTILINE)
    deployments = (templates / "prefect.yaml").read_text("utf-8")
    deployments = deployments.replace("deployments/pipeline.toml", str(files["pipeline.toml"]))
    deployments = deployments.replace("FRONTALIS_CHECKOUT:-$PWD", f"FRONTALIS_CHECKOUT:-{CHECKOUT}")
    deployments = deployments.replace("deployments/prefect.yaml", str(files["prefect.yaml"]))
    target.mkdir(parents=True, exist_ok=True)
    files["pipeline.toml"].write_text(settings, "utf-8")
    files["prefect.yaml"].write_text(deployments, "utf-8")
    print(f"wrote      {files['pipeline.toml']}\nwrote      {files['prefect.yaml']}")  # noqa: T201
    deploy = f"prefect deploy --all --prefect-file {files['prefect.yaml']}"
    print(f"next:      edit pipeline.toml, then: cd {CHECKOUT} && {deploy}")  # noqa: T201
