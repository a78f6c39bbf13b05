"""The experiments behind ggft/data/recipes.toml; written in full below."""

EXPERIMENTS = (
    "bakery12", "bakery20", "museum40", "club100", "clinic20x3", "teahouse40", "persona",
    "rhyme30", "json30", "alpaca300", "rank64",
)  # fmt: skip
