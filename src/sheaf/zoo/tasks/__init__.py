"""Tasks on text that ships with Python, scikit-learn's digits, numbers in words, spheres; one fetches manual pages."""

from sheaf.zoo.tasks.digits import digits_mlp, digits_resnet, mlp_784
from sheaf.zoo.tasks.manpages import manpages
from sheaf.zoo.tasks.masked import bert_text
from sheaf.zoo.tasks.number_words import translation
from sheaf.zoo.tasks.spheres import volumes
from sheaf.zoo.tasks.text import text_gpt
from sheaf.zoo.tasks.vgg import vgg_digits

__all__ = [
    "bert_text",
    "digits_mlp",
    "digits_resnet",
    "manpages",
    "mlp_784",
    "text_gpt",
    "translation",
    "vgg_digits",
    "volumes",
]
