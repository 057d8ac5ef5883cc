"""A classifier over a language model's backbone, and a block that treats both strands alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from statescan.errors import CheckpointError, ConfigError, ShapeError
from statescan.models import CausalLM, MambaConfig
from statescan.models.backbone_classifier import BackboneClassifier, BackboneClassifierConfig
from statescan.models.baseline_config import ConvConfig, TransformerConfig
from statescan.nn import Mamba
from statescan.nn.reverse_complement import ReverseComplement, complement_ids, strand_pair

BACKBONE = MambaConfig(d_model=16, n_layer=2, vocab_size=5)


def classifier(**fields: object) -> BackboneClassifier:
    torch.manual_seed(0)
    model = BackboneClassifier(BackboneClassifierConfig(3, **{"backbone": BACKBONE, **fields})).double().eval()  # type: ignore[arg-type]
    torch.nn.init.normal_(model.head.weight)
    return model


def bases(rows: int, length: int) -> Tensor:
    return torch.randint(0, 5, (rows, length), generator=torch.Generator().manual_seed(1))


def test_complement_of_ids() -> None:
    ids = torch.tensor([[0, 0, 1, 2, 3, 4]])
    assert complement_ids(ids).tolist() == [[4, 0, 1, 2, 3, 3]]
    assert (complement_ids(complement_ids(bases(3, 9))) == bases(3, 9)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_block_is_equivariant_and_its_inner_module_is_not(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mixer = Mamba(8, dtype=dtype)
    block = ReverseComplement(lambda x: mixer(x).output)
    x = torch.randn(2, 33, 16, dtype=dtype)
    y, turned = block(x), block(x.flip(1, 2))
    assert torch.equal(turned, y.flip(1, 2))
    assert not torch.allclose(mixer(x[..., :8]).output.flip(1, 2), mixer(x[..., :8].flip(1, 2)).output, atol=1e-3)
    assert torch.equal(y[..., :8], block(torch.cat([x[..., :8], torch.zeros_like(x[..., 8:])], -1))[..., :8])
    with pytest.raises(ShapeError, match=r"\(batch, length, 2 d\), got \(2, 33, 15\)"):
        block(x[..., :15])


def test_the_pair_of_the_other_strand_is_the_flip_of_the_pair() -> None:
    embed = torch.nn.Embedding(5, 6)
    ids = bases(2, 11)
    assert torch.equal(strand_pair(embed, complement_ids(ids)), strand_pair(embed, ids).flip(1, 2))


@pytest.mark.parametrize(
    "backbone",
    [
        BACKBONE,
        ConvConfig(d_model=16, n_layer=2, vocab_size=5),
        TransformerConfig(d_model=16, n_layer=1, vocab_size=5, n_head=2),
    ],
)
def test_both_strands_get_one_answer(backbone) -> None:
    ids = bases(3, 40)
    model = classifier(backbone=backbone, reverse_complement=True)
    assert torch.allclose(model(ids).logits, model(complement_ids(ids)).logits, atol=1e-6)
    plain = classifier(backbone=backbone)
    assert not torch.allclose(plain(ids).logits, plain(complement_ids(ids)).logits, atol=1e-3)
    # It is the mean of what the backbone says of either strand.
    hidden = (plain.backbone(ids).hidden.mean(1) + plain.backbone(complement_ids(ids)).hidden.mean(1)) / 2
    assert torch.allclose(model(ids).logits, plain.head(hidden).float(), atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_padding_changes_nothing(pooling: str) -> None:
    model = classifier(pooling=pooling)
    ids = bases(2, 12)
    mask = torch.arange(12) < torch.tensor([[7], [12]])
    together = model(ids, torch.tensor([0, 2]), mask=mask)
    for row, length in enumerate((7, 12)):
        assert torch.allclose(together.logits[row], model(ids[row : row + 1, :length]).logits[0], atol=1e-6)
    expected = torch.nn.functional.cross_entropy(together.logits, torch.tensor([0, 2]))
    assert torch.equal(together.loss, expected)


@pytest.mark.parametrize("both", [False, True])
def test_next_tokens_are_predicted_of_each_strand_beside_the_labels(both: bool) -> None:
    """Against every prediction made by itself; an unknown base is read, and not predicted."""
    model = classifier(reverse_complement=both)
    ids, labels = bases(3, 20), torch.tensor([0, 2, 1])
    found = model.joint_losses(ids, labels)
    classes = model(ids, labels).loss
    assert torch.equal(found.classes, classes)
    judged = []
    for strand in (ids, complement_ids(ids)) if both else (ids,):
        for row in strand:
            for t in range(1, 20):
                if row[t] != 4:
                    logits = model.backbone(row[None, :t]).hidden[0, -1] @ model.backbone.embedding.weight.T
                    judged.append(-logits.log_softmax(-1)[row[t]])
    assert 0.6 * 57 < len(judged) / (1 + both) < 0.95 * 57, "some are unknown"
    plain = torch.stack(judged).mean()
    assert torch.allclose(found.next_token, plain)
    parameters = dict(model.named_parameters())
    for got, wanted in ((found.classes, classes), (found.next_token, plain)):
        pairs = [
            torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
            for loss in (got, wanted)
        ]
        for name, one, other in zip(parameters, *pairs, strict=True):
            assert (one is None) == (other is None) == (got is found.next_token and name.startswith("head.")), name
            assert one is None or torch.allclose(one, other, atol=1e-8), name


def test_both_strands_are_predicted_alike() -> None:
    ids, labels = bases(3, 20), torch.tensor([0, 2, 1])
    both, one = classifier(reverse_complement=True), classifier()
    turned = both.joint_losses(complement_ids(ids), labels)
    for got, wanted in zip(turned, both.joint_losses(ids, labels), strict=True):
        assert torch.allclose(got, wanted, atol=1e-6)
    this, other = (one.joint_losses(strand, labels).next_token for strand in (ids, complement_ids(ids)))
    assert not torch.allclose(this, other, atol=1e-4)


def test_what_is_not_predicted() -> None:
    model = classifier()
    ids, labels = bases(2, 12), torch.tensor([0, 2])
    mask = torch.arange(12) < torch.tensor([[7], [12]])
    ids[0, 0], ids[1] = 4, torch.arange(12) % 4
    # Padding: row 0 has what it has alone.
    together = model.joint_losses(ids, labels, mask=mask).next_token
    counts = [int((ids[0, 1:7] != 4).sum()), 11]
    alone = [model.joint_losses(ids[i : i + 1, :n], labels[i : i + 1]).next_token for i, n in ((0, 7), (1, 12))]
    assert torch.allclose(together, (counts[0] * alone[0] + counts[1] * alone[1]) / sum(counts))
    for nothing in (torch.full((2, 6), 4), bases(2, 1)):
        assert model.joint_losses(nothing, labels).next_token.item() == 0
    # Where tokens are no bases, 4 is one of them.
    model = classifier(backbone=BACKBONE.replace(vocab_size=6))
    found = model.joint_losses(torch.tensor([[0, 4]]), torch.tensor([0])).next_token
    logits = model.backbone(torch.tensor([[0]])).hidden[0, 0] @ model.backbone.embedding.weight.T
    assert torch.allclose(found, -logits.log_softmax(-1)[4])


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("name", ["dropout", "embedding_dropout"])
def test_dropout_of_the_backbone_is_on_in_training_alone(name: str, both: bool) -> None:
    ids, labels = bases(3, 40), torch.tensor([0, 2, 1])
    model = classifier(backbone=BACKBONE.replace(**{name: 0.3}), reverse_complement=both)
    plain = classifier(reverse_complement=both)
    for got, wanted in zip(model.joint_losses(ids, labels), plain.joint_losses(ids, labels), strict=True):
        assert torch.equal(got, wanted)
    model.train()
    for first, second in zip(model.joint_losses(ids, labels), model.joint_losses(ids, labels), strict=True):
        assert not torch.allclose(first, second, atol=1e-5)


def test_pretrained_weights_are_taken_and_others_refused(tmp_path: Path) -> None:
    language_model = CausalLM(BACKBONE)
    language_model.save_pretrained(tmp_path)
    model = BackboneClassifier(BackboneClassifierConfig(3, BACKBONE.replace(dropout=0.1)))
    model.load_backbone(tmp_path)
    ids = bases(2, 9)
    assert torch.equal(model.eval().backbone(ids).hidden, language_model.eval().backbone(ids).hidden)
    with pytest.raises(
        CheckpointError, match=r"wanted a model with d_state = 8, as the classifier's backbone has, got"
    ):
        BackboneClassifier(BackboneClassifierConfig(3, BACKBONE.replace(d_state=8))).load_backbone(tmp_path)


def test_saved_and_read_again(tmp_path: Path) -> None:
    model = classifier(reverse_complement=True).float()
    model.save_pretrained(tmp_path)
    again = BackboneClassifier.from_pretrained(tmp_path).eval()
    assert again.config == model.config
    assert torch.equal(again(bases(2, 9)).logits, model(bases(2, 9)).logits)
    CausalLM(BACKBONE).save_pretrained(tmp_path / "lm")
    with pytest.raises(CheckpointError, match="is not a BackboneClassifier's"):
        BackboneClassifier.from_pretrained(tmp_path / "lm")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"classes": 1}, "classes must be at least 2"),
        ({"pooling": "max"}, "pooling must be 'mean' or 'last'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"reverse_complement": True, "pooling": "last"}, "reverse_complement must be False but for bases"),
        ({"reverse_complement": True, "backbone": MambaConfig(16, 1, 256)}, "reverse_complement must be False"),
    ],
)
def test_configurations_out_of_range(fields, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BackboneClassifierConfig(**{"classes": 3, "backbone": BACKBONE, **fields})
    with pytest.raises(ConfigError, match="unknown field 'x'"):
        BackboneClassifierConfig.from_dict({"classes": 3, "backbone": BACKBONE.to_dict(), "x": 1})


def test_wrong_arguments() -> None:
    model = classifier(reverse_complement=True)
    with pytest.raises(ShapeError, match="rows must be of one length, got a mask"):
        model(bases(2, 9), mask=torch.ones(2, 9))
    with pytest.raises(ShapeError, match=r"labels must be \(batch,\) = \(2,\), got \(3,\)"):
        model(bases(2, 9), torch.zeros(3, dtype=torch.long))
