"""The paper's tables: `rows` (what each row trains), `run_table` (training them, the table's file), `print_table`."""
