"""`fastlora explain`: the plan of the patched model, without training."""

from rich.console import Console

from .models import load_adapter, load_model
from .settings import Settings
from .train import add_lora, quiet


def explain(model: str, adapter: str | None, console: Console) -> None:
    """Print the plan of `model` with `adapter`, or with the LoRA `fastlora train` would add."""
    import fastlora

    quiet()
    base = load_model(model, "auto")
    if adapter is None:
        settings = Settings(model=model, data="", out="")
        lora = add_lora(base, settings)
        console.print(f"No --adapter: LoRA rank {settings.rank} on {settings.targets}, as fastlora train makes it")
    else:
        lora = load_adapter(base, adapter)
    lora.train()
    console.print(str(fastlora.explain(fastlora.patch(lora))))
