"""Small adversarial nets and whole architectures: what the compiler must never get wrong."""
