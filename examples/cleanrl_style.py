"""PPO after CleanRL, on tensors, without Stable-Baselines3: when should a frozen student step?"""

import gymnasium
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from redif_env import FlatVectorObservation, RelativeReward
from redif_env.errors import require

TIMES = (850, 744, 638, 531, 425, 319, 213, 106)  # the start, and what to choose from besides 0


def look(agent: nn.Module, obs: Tensor, masks: Tensor) -> tuple[Categorical, Tensor]:
    """The policy, and the value of each row."""
    out = agent(obs)
    return Categorical(logits=out[:, 1:].masked_fill(~masks, -1e9)), out[:, 0]


def main(iterations: int = 100, num_envs: int = 256, seed: int = 0, **env: object) -> list[float]:
    """Train; returns the mean gain over evenly spaced times of each iteration."""
    torch.manual_seed(seed)
    options = {"schedule": TIMES, "min_steps": 4, "max_steps": 4, "reward": "64*mse", **env}
    envs = gymnasium.make_vec("ReDiFSchedule-v0", num_envs=num_envs, **options)
    envs = FlatVectorObservation(RelativeReward(envs))
    size, choices = envs.single_observation_space.shape[0], envs.single_action_space.n
    hidden = nn.Sequential(nn.Linear(size, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh())
    agent = nn.Sequential(hidden, nn.Linear(128, 1 + choices)).to(envs.unwrapped.device)
    optimizer = torch.optim.Adam(agent.parameters(), 1e-3, eps=1e-5)
    gains, (obs, _) = [], envs.reset(seed=seed)
    for _ in range(iterations):
        steps = []
        for _ in range(envs.unwrapped.max_steps):  # whole episodes: there is nothing to bootstrap
            masks = envs.unwrapped.action_masks()
            with torch.no_grad():
                policy, value = look(agent, obs, masks)
            action = policy.sample()
            steps.append((obs, masks, action, policy.log_prob(action), value))
            obs, reward, *_ = envs.step(action)
        gains.append(float(reward.mean()))
        seen, masks, actions, log_probs, values = map(torch.cat, zip(*steps, strict=True))
        returns = reward.repeat(len(steps))  # undiscounted: all of it is paid at the end
        advantages = returns - values
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        for rows in torch.randperm(len(seen), device=seen.device).repeat(4).split(256):
            policy, value = look(agent, seen[rows], masks[rows])
            ratio = (policy.log_prob(actions[rows]) - log_probs[rows]).exp()
            gain = torch.min(ratio * advantages[rows], ratio.clamp(0.8, 1.2) * advantages[rows])
            loss = 0.5 * (value - returns[rows]).square().mean() - gain.mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
            optimizer.step()
    return gains


def show(iterations: int = 100, seed: int = 0) -> None:
    """Learn when a frozen student of 4 steps should step."""
    for iteration, gain in enumerate(main(iterations, seed=seed)):
        print(f"iteration {iteration}: gain over even times {gain:+.4f}")


if __name__ == "__main__":
    require("tyro", "examples").cli(show)
