"""Options that several commands have."""

from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        help="timm:NAME, torchvision:NAME, reparam:NAME, package.module:factory or path/file.py:factory",
        show_default=False,
    ),
]
Kwargs = Annotated[str, typer.Option(help="Arguments of the factory, as JSON: '{\"num_classes\": 10}'")]
Weights = Annotated[str, typer.Option(help="Training checkpoint to load: .safetensors or what torch.save wrote")]
TrustPickle = Annotated[bool, typer.Option("--trust-pickle", help="Unpickle the checkpoint, which runs its code")]
Averaged = Annotated[
    bool | None, typer.Option("--ema/--no-ema", help="Moving average of the weights, or the weights themselves")
]
Input = Annotated[
    list[str] | None, typer.Option("--input", help="Shape of an input, 1x3x224x224; once for each argument")
]
Cost = Annotated[str, typer.Option(help="What to minimise: default, macs, traffic, parameters or always")]
Exclude = Annotated[list[str] | None, typer.Option(help="Path pattern of modules that stay as they are")]
Only = Annotated[list[str] | None, typer.Option(help="Path pattern of modules outside of which everything stays")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else")]
