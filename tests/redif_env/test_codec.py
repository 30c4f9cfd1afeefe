"""Codecs against what diffusers' pipelines compute, and rewards on decoded pixels."""

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel

from redif_env import MSE, SSIM, Codec, Cosine, Decoded, Reward
from redif_env.errors import InvalidArgumentError
from redif_env.families import make_codec, pixel_factor
from redif_env.rewards import Discriminator, EnergyDistance, evaluate, fit_map

BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
}
KINDS = {
    "kl": lambda: AutoencoderKL(latent_channels=4, scaling_factor=0.2, **BLOCKS),
    "kl with shift": lambda: AutoencoderKL(
        latent_channels=4, scaling_factor=0.2, shift_factor=0.5, **BLOCKS
    ),
    "vq": lambda: VQModel(latent_channels=4, num_vq_embeddings=16, scaling_factor=0.3, **BLOCKS),
    "tiny": lambda: AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ),
}


@pytest.fixture(params=KINDS)
def autoencoder(request):
    torch.manual_seed(0)
    return KINDS[request.param]().eval()


def latents(num=3):
    return torch.randn(num, 4, 4, 6, generator=torch.Generator().manual_seed(1))


def test_decode_is_what_pipelines_do(autoencoder):
    codec, config = make_codec(autoencoder), autoencoder.config
    z = latents() / config.scaling_factor + (config.get("shift_factor") or 0)
    wanted = autoencoder.decode(z).sample
    # In batches of another size sums have another order; the second batch has one row.
    codec.batch_size = 2
    torch.testing.assert_close(codec.decode(latents()), wanted, rtol=1e-4, atol=1e-5)
    assert codec.decode(latents()).shape == (3, 3, 8, 12)
    assert pixel_factor(autoencoder) == 2
    unscaled = autoencoder.decode(latents()).sample
    assert config.scaling_factor == 1 or not torch.allclose(unscaled, wanted, atol=1e-2)


def test_encode_has_the_same_scale(autoencoder):
    codec, config = make_codec(autoencoder), autoencoder.config
    pixels = codec.decode(latents())
    encoded = autoencoder.encode(pixels)
    z = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    wanted = (z - (config.get("shift_factor") or 0)) * config.scaling_factor
    torch.testing.assert_close(codec.encode(pixels), wanted, rtol=1e-4, atol=1e-4)


def test_means_and_deviations_of_channels():
    torch.manual_seed(0)
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    kl = AutoencoderKL(latent_channels=4, latents_mean=mean, latents_std=std, **BLOCKS).eval()
    z = latents() * torch.tensor(std).reshape(1, 4, 1, 1) / kl.config.scaling_factor
    wanted = kl.decode(z + torch.tensor(mean).reshape(1, 4, 1, 1)).sample
    torch.testing.assert_close(make_codec(kl).decode(latents()), wanted, rtol=1e-4, atol=1e-5)


class Doubling(torch.nn.Module):
    """A codec by hand: every element becomes a square of 2 x 2 pixels."""

    def decode(self, z):
        return z.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def encode(self, pixels):
        return pixels[:, :, ::2, ::2]


CODEC = Codec(Doubling(), scale=0.5, shift=0.25)


def test_own_networks_go_there_and_back():
    torch.testing.assert_close(CODEC.encode(CODEC.decode(latents())), latents())
    wanted = Doubling().decode(0.5 * latents() + 0.25)
    torch.testing.assert_close(CODEC.decode(latents()), wanted)


def test_a_decoded_reward_is_that_of_the_pixels():
    x_0, answers = latents(), latents().flip(0)
    pixels = CODEC.decode(x_0), CODEC.decode(answers)
    for inner in (MSE(), Cosine(), MSE() + 0.5 * SSIM(sigma=0.5)):
        reward = Decoded(inner, CODEC)
        values, reward_map = evaluate(reward, x_0, answers, None)
        wanted, wanted_map = evaluate(inner, *pixels, None)
        torch.testing.assert_close(values, wanted)
        torch.testing.assert_close(reward(x_0, answers, None), inner(*pixels, None))
        assert (reward_map is None) == (wanted_map is None)
        assert not torch.allclose(wanted, inner(x_0, answers, None))


def test_the_map_of_pixels_fits_on_the_latents():
    """With squares of pixels the fitted map is the latents' own, times the scale squared."""
    x_0, answers = latents(), latents().flip(0)
    _, reward_map = evaluate(Decoded("mse", CODEC), x_0, answers, None)
    assert reward_map.shape == (3, 4, 8, 12)
    own = 0.25 * MSE().reward_map(x_0, answers, None)
    torch.testing.assert_close(fit_map(reward_map, (4, 4, 6)), own)


def test_gradients_flow_through_decoding():
    x_0 = latents().requires_grad_()
    Decoded("mse", CODEC)(x_0, latents().flip(0), None).sum().backward()
    assert x_0.grad.abs().sum() > 0


class Counting(Doubling):
    def __init__(self):
        super().__init__()
        self.rows = 0

    def decode(self, z):
        self.rows += len(z)
        return super().decode(z)


def test_a_sum_decodes_a_batch_once():
    network = Counting()
    codec, x_0, answers = Codec(network), latents(), latents().flip(0)
    other = Codec(network)
    terms = [
        Decoded(MSE(), codec),
        MSE(),
        Decoded(Cosine(), codec),
        Decoded(SSIM(sigma=0.5), codec),
    ]
    apart = [evaluate(term, x_0, answers, None)[0] for term in terms]
    assert network.rows == 3 * 6  # three decoded terms, three samples and answers each
    both = terms[0] + 2.0 * terms[1] + terms[2] + terms[3]
    for score in (lambda *samples: evaluate(both, *samples)[0], both):
        network.rows = 0
        values = score(x_0, answers, None)
        assert network.rows == 6
        torch.testing.assert_close(values, apart[0] + 2 * apart[1] + apart[2] + apart[3])
        score(x_0 + 1, answers, None)  # nothing is kept from one call to the next
        assert network.rows == 12
    assert both.nfe == terms[0].nfe == 2
    # negative control: another codec has other pixels
    network.rows = 0
    two = terms[0] + Decoded(Cosine(), other)
    evaluate(two, x_0, answers, None)
    assert network.rows == 12
    assert two.nfe == 4


def test_gradients_flow_though_a_term_before_wants_none():
    class Contrast(Reward):
        @torch.no_grad()
        def __call__(self, x_0, teacher_x_0, condition):
            return CODEC.decode(x_0).flatten(1).std(1)

    def gradient(reward):
        x_0 = latents().requires_grad_()
        reward(x_0, latents().flip(0), None).sum().backward()
        return x_0.grad

    decoded = Decoded("mse", CODEC)
    torch.testing.assert_close(gradient(Contrast() + decoded), gradient(decoded))


def test_what_can_not_be_decoded_is_refused():
    with pytest.raises(InvalidArgumentError, match="codec=None"):
        Decoded("mse", None)
    for reward in (Discriminator((4, 8, 12)), EnergyDistance(memory=8) + Cosine()):
        with pytest.raises(InvalidArgumentError, match="never be updated"):
            Decoded(reward, CODEC)
    assert Decoded(EnergyDistance(), CODEC).over_batch
    with pytest.raises(InvalidArgumentError, match="term by term"):
        Decoded("mse + cosine", CODEC)
