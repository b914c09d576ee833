"""What is known of GPU engines without a GPU, and what one command settles where there is one."""
