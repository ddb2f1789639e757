"""The recipes: one YAML a result, with its source, published and measured figures; and the verb that lists them."""

import yaml

from pipeline.command import run_command


def recipes() -> None:
    """List the recipes that come with the package."""
    from pipeline.config import recipe_names, recipes_folder

    width = max(map(len, recipe_names()))
    for name in recipe_names():
        about = yaml.safe_load((recipes_folder() / f"{name}.yaml").read_text()).get("about", {})
        print(f"{name:{width}} {about.get('what', '')}")
        for key in ("published", "measured"):
            if key in about:
                print(f"{'':{width}} {key}: {about[key]}")


def main(argv: list[str]) -> int:
    return run_command(recipes, "recipes", argv)
