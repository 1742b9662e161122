"""The prior: standardisation, drops, its published folder, its production size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import PriorTransformer

from data.errors import UserError
from training.randomness import Draws
from training.systems import prior
from training.systems.embeddings import (
    chosen,
    padded,
    spread_indices,
    token_mask,
    widened,
    widened_statistics,
)
from training.systems.prior import PriorConfig

TINY = PriorConfig(num_layers=1, num_attention_heads=2, attention_head_dim=8)


def seeded(trainable):
    torch.manual_seed(0)
    return trainable.build()


class Recorder(torch.nn.Module):
    """Keeps what the prior's network is given, and predicts zeros."""

    def forward(self, hidden_states, timestep, **conditioning):
        self.seen = {"x_t": hidden_states, "t": timestep, **conditioning}
        return (torch.zeros_like(hidden_states),)


def test_an_embeddings_entries_have_variance_one_in_the_networks_scale():
    unit = torch.nn.functional.normalize(Draws(0, torch.arange(50)).normal("e", (768,)), dim=-1)
    assert widened(unit).var().item() == pytest.approx(1, abs=0.01)


def test_statistics_are_the_mean_and_spread_of_the_rows(columns):
    mean, std = widened_statistics(columns)
    rows = columns.arrays["img_emb"] * np.float32(np.sqrt(8))
    torch.testing.assert_close(mean, torch.from_numpy(rows.mean(0)))
    torch.testing.assert_close(std, torch.from_numpy(rows.std(0)))


def test_indices_are_spread_over_everything_and_never_too_many():
    assert spread_indices(5, 10) == [0, 1, 2, 3, 4]
    assert spread_indices(1001, 11) == list(range(0, 1001, 100))


def test_padding_is_zero_and_cuts_what_is_too_long():
    states, lengths = padded([torch.ones(2, 3), torch.ones(7, 3)], 4)
    assert lengths.tolist() == [2, 4]
    assert states.sum((1, 2)).tolist() == [6, 12]
    assert token_mask(lengths, 4).tolist() == [[True, True, False, False], [True] * 4]


def test_each_sample_gets_one_of_two_values():
    assert chosen(torch.tensor([True, False]), torch.zeros(1, 2), torch.ones(2, 2)).tolist() == [
        [0, 0],
        [1, 1],
    ]


def test_a_network_that_predicts_the_mean_has_the_loss_of_the_standardised_variance(columns):
    trainable = prior.fit(TINY, columns)
    loss = trainable.loss(Recorder(), columns.batch(trainable.columns, range(12)), Draws(0, torch.arange(12)))
    assert loss.shape == (12,)
    assert loss.mean().item() == pytest.approx(1, abs=1e-4)


def test_dropped_samples_see_the_empty_caption_and_nothing_of_their_own(columns):
    config = TINY.model_copy(update={"text_drop": 0.5})
    trainable, network = prior.fit(config, columns), Recorder()
    batch = columns.batch(trainable.columns, [0] * 400)
    batch["position"] = torch.arange(400)
    trainable.loss(network, batch, Draws(0, batch["position"]))
    dropped = network.seen["attention_mask"].sum(1) == 2
    assert 0.4 < dropped.float().mean() < 0.6
    empty = torch.from_numpy(columns.empty("text_hidden"))
    assert torch.equal(network.seen["encoder_hidden_states"][dropped][0, :2], empty)
    assert network.seen["encoder_hidden_states"][dropped][:, 2:].abs().max() == 0
    torch.testing.assert_close(
        network.seen["proj_embedding"][dropped][0],
        widened(torch.from_numpy(columns.empty("text_emb"))[None])[0],
    )
    kept = network.seen["encoder_hidden_states"][~dropped]
    assert torch.equal(kept, batch["text_hidden"][: len(kept)])


def test_padding_tokens_do_not_matter(columns):
    trainable = prior.fit(TINY, columns)
    model, batch = seeded(trainable).eval(), columns.batch(trainable.columns, range(6))
    draws = Draws(0, torch.arange(6))
    before = trainable.loss(model, batch, draws)
    pads = ~token_mask(batch["text_length"], 6)
    batch["text_hidden"] = batch["text_hidden"].masked_fill(pads[..., None], 9.0)
    torch.testing.assert_close(trainable.loss(model, batch, draws), before)


def test_the_length_of_a_text_embedding_drops_out(columns):
    """Pipelines give the prior CLIP's projection as it is, not normalised."""
    trainable = prior.fit(TINY, columns)
    model, batch = seeded(trainable).eval(), columns.batch(trainable.columns, range(6))
    draws = Draws(0, torch.arange(6))
    before = trainable.loss(model, batch, draws)
    batch["text_emb"] = 7 * batch["text_emb"]
    torch.testing.assert_close(trainable.loss(model, batch, draws), before, atol=1e-4, rtol=1e-4)


def test_every_trained_weight_has_a_gradient_and_the_statistics_none(columns):
    trainable = prior.fit(TINY, columns)
    model = seeded(trainable)
    trainable.loss(
        model, columns.batch(trainable.columns, range(6)), Draws(0, torch.arange(6))
    ).mean().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == {"clip_mean", "clip_std"}


def test_the_published_folder_undoes_the_standardisation(columns, tmp_path):
    trainable = prior.fit(TINY, columns)
    trainable.publish(seeded(trainable), tmp_path)
    loaded = PriorTransformer.from_pretrained(tmp_path / "prior", low_cpu_mem_usage=False)
    embeddings = widened(torch.from_numpy(columns.arrays["img_emb"]))
    standardised = (embeddings - trainable.mean) / trainable.std
    torch.testing.assert_close(loaded.post_process_latents(standardised), embeddings)
    assert (tmp_path / "prior_scheduler" / "scheduler_config.json").is_file()


def test_a_billion_weights_build_on_the_meta_device(columns):
    config = PriorConfig(num_layers=20, num_attention_heads=32, attention_head_dim=64)
    columns.arrays["img_emb"] = np.ones((12, 768), np.float32)
    columns.arrays["text_emb"] = np.ones((12, 768), np.float32)
    columns.arrays["text_hidden"] = np.ones((12, 77, 768), np.float32)
    trainable = prior.fit(config, columns)
    with torch.device("meta"):
        model = trainable.build()
    assert 0.9e9 < sum(p.numel() for p in model.parameters()) < 1.2e9


def test_a_clip_whose_widths_differ_is_refused_with_what_to_do(narrow_text_columns):
    with pytest.raises(UserError, match=r"embeddings of 8 and text states of 6.*clip.text_width"):
        prior.fit(TINY, narrow_text_columns)
