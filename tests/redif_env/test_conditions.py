"""Tables of conditions: lookup, sharing, files, texts, and what a denoiser makes of them."""

import copy
import pickle

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import nn

from redif_env import Conditions, Denoiser
from redif_env.denoiser import rescale_guided
from redif_env.errors import InvalidArgumentError
from redif_env.loading import noise_schedule
from redif_env.prompts import read_texts

VP = noise_schedule(DDIMScheduler())
GAIN = torch.tensor([[1.0, 1.0], [10.0, 20.0], [5.0, 7.0]])
SHIFT = torch.tensor([3, 4, 5])
NULL = {"gain": torch.tensor([100.0, 200.0]), "shift": torch.tensor(0)}
X_T = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
T = torch.tensor([500.0, 20.0])
ROWS = torch.tensor([1, 0])


class Affine(nn.Module):
    """`gain * x_t + shift`, told by name; records what it was called with."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.one = nn.Parameter(torch.ones((), dtype=dtype))
        self.seen = []

    def forward(self, x_t, t, *, gain, shift):
        self.seen.append((x_t.dtype, gain.dtype, shift.dtype))
        return self.one * gain * x_t + shift[:, None]


def table(null=NULL):
    return Conditions({"gain": GAIN, "shift": SHIFT}, null=null, texts=["a", "b", "c"])


def denoiser(scale=1.0, dtype=torch.float32, **options):
    options = {"conditions": table(), **options}
    return Denoiser(Affine(dtype), VP, "sample", (2,), guidance_scale=scale, **options)


def test_rows_are_looked_up_by_number():
    wanted = GAIN[ROWS] * X_T + SHIFT[ROWS, None]
    assert torch.equal(denoiser().predict(X_T, T, ROWS), wanted)
    assert denoiser().num_classes == len(table()) == 3
    assert denoiser().initial_condition(500, torch.Generator().manual_seed(0)).max() == 2


@pytest.mark.parametrize("w", [0.0, 3.0])
def test_guidance_leads_away_from_the_null(w):
    cond, uncond = GAIN[ROWS] * X_T + SHIFT[ROWS, None], NULL["gain"] * X_T
    guided = denoiser(w)
    torch.testing.assert_close(guided.predict(X_T, T, ROWS), uncond + w * (cond - uncond))
    assert guided.nfe == 2
    assert guided.network_evaluations == 4


def test_a_table_without_null_allows_no_guidance():
    plain = denoiser(conditions=table(None))
    assert (plain.nfe, plain.null_class) == (1, None)
    with pytest.raises(InvalidArgumentError, match=r"guidance_scale=2\.0.*null"):
        plain.set_guidance(2.0)
    assert (plain.guidance_scale, plain.nfe) == (1, 1)  # as before


def test_latents_and_floating_rows_have_the_networks_dtype():
    """Whole numbers stay whole, and what comes out has the latents' dtype."""
    half = denoiser(dtype=torch.bfloat16)
    out = half.predict(X_T, T, ROWS)
    assert half.network.seen == [(torch.bfloat16, torch.bfloat16, torch.int64)]
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, denoiser().predict(X_T, T, ROWS), rtol=1e-2, atol=0)


def test_copies_share_the_table_and_state_dicts_leave_it_out():
    one = denoiser()
    two = copy.deepcopy(one)
    assert two.conditions is one.conditions
    assert two.network is not one.network
    assert set(one.state_dict()) == {"network.one"}
    assert {name for name, _ in one.named_buffers() if "rows" in name}  # it moves with `to`


@pytest.mark.parametrize("null", [NULL, None], ids=["null", "no null"])
def test_files_and_pickles_give_it_back(tmp_path, null):
    one = table(null)
    one.save(tmp_path / "table.safetensors")
    for two in (Conditions.load(tmp_path / "table.safetensors"), pickle.loads(pickle.dumps(one))):
        assert (len(two), two.null_row, two.texts) == (3, one.null_row, ["a", "b", "c"])
        for name, tensor in one.tensors().items():
            assert torch.equal(two.tensors()[name], tensor)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "table.safetensors").write_bytes(b"no table")
    with pytest.raises(InvalidArgumentError, match=r"table\.safetensors.*Conditions\.save"):
        Conditions.load(tmp_path / "table.safetensors")


def test_shared_rows_are_the_same_for_all_and_for_the_null():
    wide = table().with_shared({"size": torch.tensor([[7.0, 8.0]])})
    assert wide.tensors()["size"].tolist() == [[7.0, 8.0]] * 4
    assert (len(wide), wide.null_row) == (3, 3)
    assert torch.equal(wide.tensors()["gain"], table().tensors()["gain"])


@pytest.mark.parametrize("rescale", [0.0, 0.3, 1.0])
def test_rescaled_guidance_is_diffusers(rescale):
    guided, cond = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    ours = rescale_guided(7 * guided, cond, rescale)
    # The standard deviations are summed in another order.
    torch.testing.assert_close(ours, rescale_noise_cfg(7 * guided, cond, rescale))
    assert rescale == 0 or not torch.allclose(ours, 7 * guided, rtol=0.1)


def test_rescale_is_used_by_predict():
    plain, rescaled = denoiser(3.0), denoiser(3.0, guidance_rescale=1.0)
    cond = denoiser().predict(X_T, T, ROWS)
    out = rescaled.predict(X_T, T, ROWS)
    torch.testing.assert_close(out.std(1), cond.std(1))
    assert not torch.allclose(out, plain.predict(X_T, T, ROWS))


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: Conditions({}), "tensors"),
        (lambda: Conditions({"a": torch.ones(2, 3), "b": torch.ones(3)}), "tensors"),
        (lambda: Conditions({"a": torch.ones(0, 3)}), "tensors"),
        (lambda: Conditions({"a": torch.tensor(1.0)}), "tensors"),
        (lambda: Conditions({"a": torch.ones(2, 3)}, null={"a": torch.ones(4)}), "null"),
        (lambda: Conditions({"a": torch.ones(2, 3)}, null={"b": torch.ones(3)}), "null"),
        (lambda: Conditions({"a": torch.ones(2, 3)}, texts=["one"]), "texts"),
        (lambda: denoiser(num_classes=3), "conditions"),
        (lambda: denoiser(guidance_rescale=1.5), "guidance_rescale"),
        (lambda: read_texts([]), "prompts"),
        (lambda: read_texts("no such file.txt"), "prompts"),
        (lambda: read_texts([{"label": 3}]), "prompts"),
        (lambda: read_texts([3]), "prompts"),
        (lambda: read_texts(3), "prompts"),
    ],
)
def test_bad_input(make, argument):
    with pytest.raises(InvalidArgumentError) as caught:
        make()
    assert caught.value.argument == argument


def test_texts_come_from_files_lists_and_records(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dög \n", encoding="utf-8")
    wanted = ["a cat", "a dög"]
    assert read_texts(tmp_path / "prompts.txt") == wanted
    assert read_texts(str(tmp_path / "prompts.txt")) == wanted
    assert read_texts(wanted) == wanted
    assert read_texts(text for text in wanted) == wanted
    assert read_texts([{"image": None, "caption": text} for text in wanted]) == wanted
