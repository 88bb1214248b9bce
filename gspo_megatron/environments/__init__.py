"""Who answers the model in a conversation."""
