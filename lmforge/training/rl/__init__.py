"""Reinforcement learning on the policy's own answers: rollouts, what is learned from them, PPO and GRPO."""
