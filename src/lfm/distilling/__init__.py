"""What methods of distillation share: students, what they are taught from, and what teachers tell."""
