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
    if model.config.head == "linear":
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
def test_likelihoods_are_sums_of_single_predictions(both: bool) -> None:
    """Bayes' rule by hand, base by base; an unknown base is read, and not predicted."""
    model = classifier(reverse_complement=both, head="likelihood")
    torch.nn.init.normal_(model.label.weight)
    torch.nn.init.normal_(model.start)
    ids, labels = bases(3, 12), torch.tensor([0, 2, 1])
    weight = model.backbone.embedding.weight

    def plain(row: Tensor, label: int) -> Tensor:
        total = torch.zeros(())
        for t in range(len(row)):
            if row[t] != 4:
                before = torch.cat([model.start[None], weight[row[:t]]]) + model.label.weight[label]
                total = (
                    total
                    + (model.backbone(inputs_embeds=before[None]).hidden[0, -1] @ weight.T).log_softmax(-1)[row[t]]
                )
        return total

    strands = (ids, complement_ids(ids)) if both else (ids,)
    each = torch.stack(
        [torch.stack([torch.stack([plain(row, c) for c in range(3)]) for row in strand]) for strand in strands]
    )
    output = model(ids, labels)
    assert torch.allclose(output.logits, each.mean(0), atol=1e-5)
    assert torch.allclose(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    # Training minimises the likelihoods of the sequences' own labels, ...
    own = each[:, torch.arange(3), labels].sum() / -sum(int((strand != 4).sum()) for strand in strands)
    # ... and the cross entropy of the labels, -log softmax_c(log p(x|c)).
    mean = each.mean(0)
    told = (mean.exp().sum(1).log() - mean[torch.arange(3), labels]).mean()
    parameters = list(model.parameters())
    assert output.loss is not None
    for loss, by_hand in ((model.generative_loss(ids, labels), own), (output.loss, told)):
        assert torch.allclose(loss, by_hand, atol=1e-6)
        found, wanted = (torch.autograd.grad(value, parameters, retain_graph=True) for value in (loss, by_hand))
        for got, expected in zip(found, wanted, strict=True):
            assert expected.any()
            assert torch.allclose(got, expected, atol=1e-6)


def test_likelihoods_are_not_rounded_by_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states come in autocast's dtype; what is summed over hundreds of tokens does not."""
    model = classifier(head="likelihood").float()
    torch.nn.init.normal_(model.backbone.embedding.weight)
    ids, hidden = bases(2, 500), torch.randn(2, 500, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    monkeypatch.setattr(model, "_read", lambda inputs, labels, mask: (hidden.repeat(3, 1, 1), inputs % 4))
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids).logits
    scores = hidden.double() @ model.backbone.embedding.weight.double().T
    wanted = scores.log_softmax(-1).gather(-1, (ids % 4)[..., None]).sum((1, 2))
    assert torch.allclose(found.double(), wanted[:, None].expand(-1, 3), rtol=1e-5)


def test_likelihoods_keep_no_logits() -> None:
    """Of a large vocabulary they would be the most of what training keeps, once a label."""
    model = classifier(backbone=BACKBONE.replace(vocab_size=3000), head="likelihood").train()
    ids, kept = torch.randint(0, 3000, (2, 20)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        loss = model(ids, torch.tensor([0, 2])).loss
    assert max(kept) < 3 * 2 * 20 * 3000
    loss.backward()
    assert model.backbone.embedding.weight.grad.any()


def test_both_strands_are_as_likely() -> None:
    ids = bases(3, 20)
    both, one = classifier(reverse_complement=True, head="likelihood"), classifier(head="likelihood")
    for model in (both, one):
        torch.nn.init.normal_(model.label.weight, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(both(complement_ids(ids)).logits, both(ids).logits, atol=1e-5)
    assert not torch.allclose(one(complement_ids(ids)).logits, one(ids).logits, atol=1e-3)


def test_what_has_no_likelihood() -> None:
    """Padding, unknown bases, and what a likelihood has not."""
    model = classifier(head="likelihood")
    torch.nn.init.normal_(model.label.weight)
    ids, labels = bases(2, 12), torch.tensor([0, 2])
    ids[0, 0] = 4
    mask = torch.arange(12) < torch.tensor([[7], [12]])
    together = model(ids, labels, mask=mask)
    alone = [model(ids[i : i + 1, :n]).logits for i, n in ((0, 7), (1, 12))]
    assert torch.allclose(together.logits, torch.cat(alone), atol=1e-5)
    counts = [int((ids[i, :n] != 4).sum()) for i, n in ((0, 7), (1, 12))]
    rows = [model.generative_loss(ids[i : i + 1, :n], labels[i : i + 1]) for i, n in ((0, 7), (1, 12))]
    whole = model.generative_loss(ids, labels, mask=mask)
    assert torch.allclose(whole, (counts[0] * rows[0] + counts[1] * rows[1]) / sum(counts), atol=1e-6)
    assert torch.equal(model(torch.full((2, 6), 4)).logits, torch.zeros(2, 3))
    # Where tokens are no bases, 4 is one of them.
    model = classifier(backbone=BACKBONE.replace(vocab_size=6), head="likelihood")
    assert (model(torch.tensor([[4]])).logits < -0.1).all()
    for wrong in ({"pooling": "last"}, {"dropout": 0.1}):
        with pytest.raises(ConfigError, match="head must be 'linear' where pooling or dropout is set"):
            classifier(head="likelihood", **wrong)
    with pytest.raises(ConfigError, match="head must be 'linear' for a backbone without tie_embeddings"):
        classifier(head="likelihood", backbone=BACKBONE.replace(tie_embeddings=False))
    with pytest.raises(ConfigError, match="head must be 'linear' or 'likelihood', got 'bayes'"):
        classifier(head="bayes")
    with pytest.raises(ShapeError, match=r"labels must be \(batch,\) = \(2,\), got \(3,\)"):
        model.generative_loss(bases(2, 5), torch.tensor([0, 1, 2]))
    with pytest.raises(ConfigError, match="generative_loss: head must be 'likelihood', got 'linear'"):
        classifier().generative_loss(ids, labels)
    with pytest.raises(ShapeError, match="rows must be of one length, got a mask"):
        classifier(reverse_complement=True, head="likelihood")(ids, mask=mask)


def test_likelihoods_are_kept_in_a_folder(tmp_path: Path) -> None:
    model = classifier(reverse_complement=True, head="likelihood").eval()
    torch.nn.init.normal_(model.label.weight)
    model.save_pretrained(tmp_path)
    ids = bases(2, 30)
    again = BackboneClassifier.from_pretrained(tmp_path).double().eval()
    assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-4)
    assert not torch.allclose(again(ids).logits[:, 0], again(ids).logits[:, 1], atol=1e-2)


@pytest.mark.parametrize("head", ["linear", "likelihood"])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("name", ["dropout", "embedding_dropout"])
def test_dropout_of_the_backbone_is_on_in_training_alone(name: str, both: bool, head: str) -> None:
    ids, labels = bases(3, 40), torch.tensor([0, 2, 1])
    model = classifier(backbone=BACKBONE.replace(**{name: 0.3}), reverse_complement=both, head=head)
    plain = classifier(reverse_complement=both, head=head)

    def losses(some: BackboneClassifier) -> list[Tensor]:
        own = some(ids, labels).loss
        assert own is not None
        return [own, some.generative_loss(ids, labels)] if head == "likelihood" else [own]

    assert all(torch.equal(*pair) for pair in zip(losses(model), losses(plain), strict=True))
    model.train()
    assert not any(torch.allclose(*pair, atol=1e-5) for pair in zip(losses(model), losses(model), strict=True))


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
    # In the sizes that were passed, though a likelihood repeats them for each label.
    for head in ("linear", "likelihood"):
        for shape in ((2, 8), (1, 9), (6, 9)):
            message = rf"mask must be \(batch, length\) = \(2, 9\), as inputs, got \({shape[0]}, {shape[1]}\)"
            other, mask = classifier(head=head), torch.ones(shape, dtype=torch.bool)
            with pytest.raises(ShapeError, match=message):
                other(bases(2, 9), mask=mask)
            if head == "likelihood":
                with pytest.raises(ShapeError, match=message):
                    other.generative_loss(bases(2, 9), torch.tensor([0, 1]), mask=mask)
    with pytest.raises(ShapeError, match=r"labels must be \(batch,\) = \(2,\), got \(3,\)"):
        model(bases(2, 9), torch.zeros(3, dtype=torch.long))
