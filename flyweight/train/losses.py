"""What a training minimises: cross-entropy, of auxiliary heads and against a teacher's answers too."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flyweight.net import Net
from flyweight.train.recipe import Recipe


def loss_of(net: nn.Module, x: Tensor, targets: Tensor, recipe: Recipe, teacher: nn.Module | None = None) -> Tensor:
    """The mean loss of a batch; `targets` are labels [N] or the classes' shares [N, classes].

    Auxiliary heads add their cross-entropy at their weight. With a teacher, the answers' cross-entropy gives way by
    the recipe's share to the distance from the teacher's.
    """

    def entropy(outputs: Tensor) -> Tensor:
        return F.cross_entropy(_full(outputs), targets, label_smoothing=recipe.label_smoothing)

    if isinstance(net, Net) and net.aux:
        outputs, others = net.forward_aux(x)
        aux = net.aux_weight * torch.stack([entropy(other) for other in others]).sum()
    else:
        outputs, aux = net(x), 0.0
    loss = entropy(outputs)
    if teacher is not None and recipe.distil:
        loss = loss.lerp(distance(_full(outputs), _answers(teacher, x), recipe.temperature), recipe.distil)
    return loss + aux


def distance(outputs: Tensor, answers: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(answers / T) ‖ softmax(outputs / T)), the mean over a batch (arXiv:1503.02531, section 2)."""
    student, teacher = (F.log_softmax(each / temperature, dim=1) for each in (outputs, answers))
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


@torch.no_grad()
def _answers(teacher: nn.Module, x: Tensor) -> Tensor:
    return _full(teacher.eval()(x))


def _full(x: Tensor) -> Tensor:
    """In float32 at least: half precision does not suffice for a loss."""
    return x if x.dtype == torch.float64 else x.float()
