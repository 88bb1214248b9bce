"""The smallest model that has every part: several layers, grouped queries, experts, a vocabulary no tp divides."""

SMALL = (
    "model.num_layers=2",
    "model.hidden_size=16",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.head_dim=8",
    "model.num_experts=4",
    "model.expert_ffn_size=12",
    "model.vocab_size=13",
    "precision.device=cpu",
)
