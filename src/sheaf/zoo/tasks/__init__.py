"""Tasks on real data that needs no download: text that ships with Python, scikit-learn's digits."""

from sheaf.zoo.tasks.digits import digits_mlp, digits_resnet, mlp_784
from sheaf.zoo.tasks.text import text_gpt

__all__ = ["digits_mlp", "digits_resnet", "mlp_784", "text_gpt"]
