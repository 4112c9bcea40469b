"""How texts are made: weights, engines and supervised fine-tuning."""
